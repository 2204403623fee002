// The loops of kernels.h in terms of `kWidth`-wide vectors. No include guard: kernels.cpp includes this file once for
// each instruction set, inside that set's namespace, after it has defined GPO_WIDTH, splat, fused and vmax.

constexpr int kWidth = GPO_WIDTH;
typedef uint32_t bits_t __attribute__((vector_size(4 * GPO_WIDTH)));
typedef uint16_t half_t __attribute__((vector_size(2 * GPO_WIDTH)));

template <typename V, typename T>
inline V load_as(const T* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline vec load(const float* from) { return load_as<vec>(from); }
inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof value); }

inline float lane_sum(vec value) {
    float sum = 0;
    for (int i = 0; i < kWidth; ++i) sum += value[i];
    return sum;
}
inline float lane_max(vec value) {
    float highest = value[0];
    for (int i = 1; i < kWidth; ++i) highest = std::max(highest, value[i]);
    return highest;
}

inline vec widen_half(const uint16_t* from) {
    return (vec)(__builtin_convertvector(load_as<half_t>(from), bits_t) << 16);
}
inline bits_t rounded_bits(vec value) {
    const bits_t bits = (bits_t)value;
    return bits + 0x7fff + ((bits >> 16) & 1);
}
inline vec rounded(vec value) { return (vec)(rounded_bits(value) & 0xffff0000u); }
inline vec rounded_if(bool round, vec value) { return round ? rounded(value) : value; }
inline float rounded_if(bool round, float value) {
    if (!round) return value;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    std::memcpy(&value, &bits, sizeof bits);
    return value;
}

// exp to about one unit in the last place; 0 below e^-87, arguments above 88 count as 88.
inline vec exponential(vec x) {
    const bits_t alive = (bits_t)(x > splat(-87.0f));
    x = vmax(splat(-87.0f), x);
    x = -vmax(splat(-88.0f), -x);
    const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const vec shifted = fused(x, splat(1.44269504f), magic);
    const vec n = shifted - magic;
    vec r = fused(n, splat(-0.693359375f), x);
    r = fused(n, splat(2.12194440e-4f), r);
    vec p = splat(1.0f / 720);
    p = fused(p, r, splat(1.0f / 120));
    p = fused(p, r, splat(1.0f / 24));
    p = fused(p, r, splat(1.0f / 6));
    p = fused(p, r, splat(0.5f));
    p = fused(p, r, splat(1.0f));
    p = fused(p, r, splat(1.0f));
    const bits_t exponent = ((bits_t)shifted - (bits_t)magic + 127) << 23;
    return (vec)((bits_t)(p * (vec)exponent) & alive);
}

// A tile of R rows and V vectors of c stays in registers while the depth runs.
template <int R, int V>
inline void multiply_tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
                          int64_t ldc, bool accumulate) {
    vec sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = accumulate ? load(c + r * ldc + v * kWidth) : splat(0.0f);
    for (int64_t k = 0; k < depth; ++k) {
        vec right[V];
        for (int v = 0; v < V; ++v) right[v] = load(b + k * ldb + v * kWidth);
        for (int r = 0; r < R; ++r) {
            const vec left = splat(a[r * lda + k]);
            for (int v = 0; v < V; ++v) sum[r][v] = fused(left, right[v], sum[r][v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(c + r * ldc + v * kWidth, sum[r][v]);
}

template <int V>
inline void multiply_columns(const float* a, int64_t lda, int64_t rows, const float* b, int64_t ldb, int64_t depth,
                             float* c, int64_t ldc, bool accumulate) {
    int64_t i = 0;
    for (; i + 6 <= rows; i += 6) multiply_tile<6, V>(a + i * lda, lda, b, ldb, depth, c + i * ldc, ldc, accumulate);
    a += i * lda;
    c += i * ldc;
    switch (rows - i) {
        case 5:
            return multiply_tile<5, V>(a, lda, b, ldb, depth, c, ldc, accumulate);
        case 4:
            return multiply_tile<4, V>(a, lda, b, ldb, depth, c, ldc, accumulate);
        case 3:
            return multiply_tile<3, V>(a, lda, b, ldb, depth, c, ldc, accumulate);
        case 2:
            return multiply_tile<2, V>(a, lda, b, ldb, depth, c, ldc, accumulate);
        case 1:
            return multiply_tile<1, V>(a, lda, b, ldb, depth, c, ldc, accumulate);
        default:
            return;
    }
}

static void multiply(const float* a, int64_t lda, int64_t rows, const float* b, int64_t ldb, int64_t depth,
                     int64_t columns, float* c, int64_t ldc, bool accumulate) {
    constexpr int kVectors = GPO_TILE_VECTORS;
    int64_t j = 0;
    for (; j + kVectors * kWidth <= columns; j += kVectors * kWidth)
        multiply_columns<kVectors>(a, lda, rows, b + j, ldb, depth, c + j, ldc, accumulate);
    for (; j < columns; j += kWidth) multiply_columns<1>(a, lda, rows, b + j, ldb, depth, c + j, ldc, accumulate);
}

// c [32] = one row times a strip of bfloat16 pairs, read in order: the even k is the low half of a 32-bit word, the odd
// one the high half.
inline void pair_row(const float* a, const uint32_t* pairs, int64_t depth, float* c) {
    constexpr int kVectors = kStripColumns / kWidth;
    vec sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = splat(0.0f);
    for (int64_t k = 0; k < depth; k += 2, pairs += kStripColumns) {
        const vec even = splat(a[k]), odd = splat(a[k + 1]);
        for (int v = 0; v < kVectors; ++v) {
            const bits_t both = load_as<bits_t>(pairs + v * kWidth);
            sum[v] = fused(even, (vec)(both << 16), sum[v]);
            sum[v] = fused(odd, (vec)(both & 0xffff0000u), sum[v]);
        }
    }
    for (int v = 0; v < kVectors; ++v) store(c + v * kWidth, sum[v]);
}

// A stretch of a strip is widened once for all rows into `wide`, which stays in the cache, in parts as wide as a tile.
// One row widens as it reads.
inline void multiply_strip(const float* a, int64_t lda, int64_t rows, const uint32_t* pairs, int64_t depth, float* c,
                           int64_t ldc) {
    constexpr int64_t kTile = 2 * kWidth, kStretch = 256;
    if (rows == 1) return pair_row(a, pairs, depth, c);
    alignas(64) float wide[kStretch * kStripColumns];
    for (int64_t start = 0; start < depth; start += kStretch) {
        const int64_t count = std::min(kStretch, depth - start);
        for (int64_t k = 0; k < count; k += 2) {
            const uint32_t* row = pairs + (start + k) / 2 * kStripColumns;
            for (int64_t j = 0; j < kStripColumns; j += kWidth) {
                float* to = wide + j / kTile * kTile * count + k * kTile + j % kTile;
                const bits_t both = load_as<bits_t>(row + j);
                store(to, (vec)(both << 16));
                store(to + kTile, (vec)(both & 0xffff0000u));
            }
        }
        for (int64_t j = 0; j < kStripColumns; j += kTile)
            multiply_columns<2>(a + start, lda, rows, wide + j * count, kTile, count, c + j, ldc, start > 0);
    }
}

[[maybe_unused]] static void multiply_panel(const float* a, const uint16_t*, int64_t lda, int64_t rows,
                                            const void* panel, int64_t depth, float* c, int64_t ldc) {
    const uint32_t* strip = static_cast<const uint32_t*>(panel);
    for (int64_t j = 0; j < kPanelColumns; j += kStripColumns, strip += depth / 2 * kStripColumns)
        multiply_strip(a, lda, rows, strip, depth, c + j, ldc);
}

[[maybe_unused]] static void pack_strip(const uint32_t* from, int64_t rows, int64_t words, int64_t columns,
                                        uint32_t* to) {
    constexpr int64_t kLine = 16;  // words of a cache line
    for (int64_t start = 0; start < words; start += kLine)
        for (int64_t word = start; word < std::min(words, start + kLine); ++word)
            for (int64_t row = 0; row < rows; ++row) to[word * columns + row] = from[row * words + word];
}

static void widen(const uint16_t* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(to + i, widen_half(from + i));
    for (; i < count; ++i) {
        const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
        std::memcpy(to + i, &bits, sizeof bits);
    }
}

static void narrow(const float* from, int64_t count, uint16_t* to) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
        const half_t half = __builtin_convertvector(rounded_bits(load(from + i)) >> 16, half_t);
        std::memcpy(to + i, &half, sizeof half);
    }
    for (; i < count; ++i) {
        const float value = rounded_if(true, from[i]);
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        to[i] = static_cast<uint16_t>(bits >> 16);
    }
}

static void round_values(float* values, int64_t count) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(values + i, rounded(load(values + i)));
    for (; i < count; ++i) values[i] = rounded_if(true, values[i]);
}

static void rms_norm(const float* x, const float* weight, int64_t width, float epsilon, bool round, float* out) {
    vec squares = splat(0.0f);
    int64_t i = 0;
    for (; i + kWidth <= width; i += kWidth) squares = fused(load(x + i), load(x + i), squares);
    float sum = lane_sum(squares);
    for (; i < width; ++i) sum += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(width) + epsilon);
    for (i = 0; i + kWidth <= width; i += kWidth) {
        const vec normal = rounded_if(round, load(x + i) * splat(scale));
        store(out + i, rounded_if(round, normal * load(weight + i)));
    }
    for (; i < width; ++i) out[i] = rounded_if(round, rounded_if(round, x[i] * scale) * weight[i]);
}

static void rotate(float* x, const float* cos, const float* sin, int64_t width, bool round) {
    const int64_t half = width / 2;
    int64_t i = 0;
    for (; i + kWidth <= half; i += kWidth) {
        const vec low = load(x + i), high = load(x + half + i);
        const vec low_cos = rounded_if(round, low * load(cos + i));
        const vec high_cos = rounded_if(round, high * load(cos + half + i));
        const vec high_sin = rounded_if(round, high * load(sin + i));
        const vec low_sin = rounded_if(round, low * load(sin + half + i));
        store(x + i, rounded_if(round, low_cos - high_sin));
        store(x + half + i, rounded_if(round, high_cos + low_sin));
    }
    for (; i < half; ++i) {
        const float low = x[i], high = x[half + i];
        x[i] = rounded_if(round, rounded_if(round, low * cos[i]) - rounded_if(round, high * sin[i]));
        x[half + i] =
            rounded_if(round, rounded_if(round, high * cos[half + i]) + rounded_if(round, low * sin[half + i]));
    }
}

static void silu_times(const float* gate, const float* up, int64_t count, bool round, float* out) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
        const vec x = rounded_if(round, load(gate + i)), y = rounded_if(round, load(up + i));
        const vec silu = rounded_if(round, x / (splat(1.0f) + exponential(-x)));
        store(out + i, rounded_if(round, silu * y));
    }
    for (; i < count; ++i) {
        const float x = rounded_if(round, gate[i]), y = rounded_if(round, up[i]);
        out[i] = rounded_if(round, rounded_if(round, x / (1.0f + std::exp(-x))) * y);
    }
}

static void add(float* x, const float* y, int64_t count, bool round) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth)
        store(x + i, rounded_if(round, load(x + i) + rounded_if(round, load(y + i))));
    for (; i < count; ++i) x[i] = rounded_if(round, x[i] + rounded_if(round, y[i]));
}

// One key or value of `dim` elements as float32.
inline void fetch(const void* base, int64_t element, int64_t dim, bool is_bfloat16, float* to) {
    if (is_bfloat16) {
        widen(static_cast<const uint16_t*>(base) + element, dim, to);
    } else {
        std::memcpy(to, static_cast<const float*>(base) + element, dim * sizeof(float));
    }
}

// The keys of a tile as columns: to[d * kKeyTile + t].
static void transpose_keys(const float* keys, int64_t padded, int64_t dim, int64_t count, float* to) {
    constexpr int64_t kBlock = 8;
    for (int64_t d = 0; d < dim; d += kBlock)
        for (int64_t t = 0; t < count; ++t)
            for (int64_t i = d; i < std::min(dim, d + kBlock); ++i) to[i * kKeyTile + t] = keys[t * padded + i];
}

// scores[r * kKeyTile + t] = query r . key t, for few rows: the keys are read as they lie.
static void score_few(const float* query, int64_t rows, const float* keys, int64_t padded, int64_t count,
                      float* scores) {
    for (int64_t t = 0; t < count; ++t) {
        for (int64_t r = 0; r < rows; ++r) {
            vec sum = splat(0.0f);
            for (int64_t d = 0; d < padded; d += kWidth)
                sum = fused(load(query + r * padded + d), load(keys + t * padded + d), sum);
            scores[r * kKeyTile + t] = lane_sum(sum);
        }
    }
}

// exp(score - highest) in place for the first `seen` scores, zero for the rest of the tile; the row's earlier sums
// are scaled to the new highest.
inline void softmax_row(const AttentionPiece& piece, int64_t row, int64_t seen, float* scores) {
    if (seen <= 0) {
        std::memset(scores, 0, kKeyTile * sizeof(float));
        return;
    }
    for (int64_t t = 0; t < kKeyTile; t += kWidth) store(scores + t, load(scores + t) * splat(piece.scale));
    if (piece.softcap > 0) {
        for (int64_t t = 0; t < seen; ++t) scores[t] = piece.softcap * std::tanh(scores[t] / piece.softcap);
    }
    for (int64_t t = seen; t < kKeyTile; ++t) scores[t] = -std::numeric_limits<float>::infinity();
    vec top = load(scores);
    for (int64_t t = kWidth; t < kKeyTile; t += kWidth) top = vmax(top, load(scores + t));
    const float before = piece.highest[row], highest = std::max(before, lane_max(top));
    vec total = splat(0.0f);
    for (int64_t t = 0; t < kKeyTile; t += kWidth) {
        const vec weight = exponential(load(scores + t) - splat(highest));
        store(scores + t, weight);
    }
    for (int64_t t = seen; t < kKeyTile; ++t) scores[t] = 0;
    for (int64_t t = 0; t < kKeyTile; t += kWidth) total += load(scores + t);
    const float shrink = std::exp(before - highest);  // 0 for the first keys that the row sees
    piece.total[row] = piece.total[row] * shrink + lane_sum(total);
    piece.highest[row] = highest;
    if (shrink != 1) {
        float* sum = piece.sum + row * piece.padded;
        for (int64_t d = 0; d < piece.padded; d += kWidth) store(sum + d, load(sum + d) * splat(shrink));
    }
}

static void attend(const AttentionPiece& piece) {
    const int64_t rows = piece.rows, padded = piece.padded, dim = piece.dim;
    float* keys = piece.scratch;
    float* values = keys + kKeyTile * padded;  // the tile's keys before they are transposed, then its values
    float* scores = values + kKeyTile * padded;
    const bool few = rows <= 4;
    for (int64_t r = 0; r < rows; ++r) {
        piece.highest[r] = -std::numeric_limits<float>::infinity();
        piece.total[r] = 0;
    }
    std::memset(piece.sum, 0, rows * padded * sizeof(float));
    std::memset(keys, 0, 2 * kKeyTile * padded * sizeof(float));  // the padding beyond `dim` counts for nothing
    for (int64_t start = piece.first; start < piece.first + piece.count; start += kKeyTile) {
        const int64_t count = std::min<int64_t>(kKeyTile, piece.first + piece.count - start);
        int64_t element[kKeyTile];
        for (int64_t t = 0; t < count; ++t) {
            const int64_t page = piece.pages[(start + t) / piece.block_size];
            element[t] = (page * piece.block_size + (start + t) % piece.block_size) * piece.slot_stride;
        }
        float* direct = few ? keys : values;
        for (int64_t t = 0; t < count; ++t) fetch(piece.keys, element[t], dim, piece.is_bfloat16, direct + t * padded);
        if (few) {
            score_few(piece.query, rows, keys, padded, count, scores);
        } else {
            transpose_keys(values, padded, dim, count, keys);
            multiply(piece.query, padded, rows, keys, kKeyTile, dim, kKeyTile, scores, kKeyTile, false);
        }
        for (int64_t r = 0; r < rows; ++r)
            softmax_row(piece, r, std::min<int64_t>(count, piece.visible[r] - start), scores + r * kKeyTile);
        for (int64_t t = 0; t < count; ++t)
            fetch(piece.values, element[t], dim, piece.is_bfloat16, values + t * padded);
        multiply(scores, kKeyTile, rows, values, padded, count, padded, piece.sum, padded, true);
    }
}

static float largest(const float* x, int64_t count) {
    float highest = -std::numeric_limits<float>::infinity();
    int64_t i = 0;
    if (count >= kWidth) {
        vec top = load(x);
        for (i = kWidth; i + kWidth <= count; i += kWidth) top = vmax(load(x + i), top);
        highest = lane_max(top);
    }
    for (; i < count; ++i) highest = std::max(highest, x[i]);
    return highest;
}

static double sum_exp(const float* x, int64_t count, float highest, float inverse_temperature) {
    double total = 0;
    int64_t i = 0;
    while (i + kWidth <= count) {  // float32 sums over short runs, float64 over those
        const int64_t stop = std::min(count, i + kSumBlock);
        vec sum = splat(0.0f);
        for (; i + kWidth <= stop; i += kWidth)
            sum += exponential((load(x + i) - splat(highest)) * splat(inverse_temperature));
        total += lane_sum(sum);
    }
    for (; i < count; ++i) total += std::exp((x[i] - highest) * inverse_temperature);
    return total;
}

static void exp_into(const float* x, int64_t count, float highest, float inverse_temperature, float* out) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth)
        store(out + i, exponential((load(x + i) - splat(highest)) * splat(inverse_temperature)));
    for (; i < count; ++i) out[i] = std::exp((x[i] - highest) * inverse_temperature);
}
