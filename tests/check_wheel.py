"""What an installed gpo-fast must hold. Needs numpy only: python tests/check_wheel.py

Run it by the Python of an environment in which a wheel is installed, not the working tree.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata, resources
from pathlib import Path

import gpo_fast._C
import gpo_fast.kernels

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> None:
    home = Path(gpo_fast.__file__).resolve()
    assert REPOSITORY / "gpo_fast" not in home.parents, f"{home} is the working tree, not an installed copy"
    assert gpo_fast.__version__ == metadata.version("gpo-fast")
    for module in ("linear_logprob", "tree_attention", "shared_attention", "sampling", "kv_blocks", "step_loss"):
        assert importlib.util.find_spec(f"gpo_fast.kernels.{module}") is not None, f"gpo_fast.kernels.{module}"
    assert importlib.util.find_spec("kernels") is None, "the bare name 'kernels' belongs to another package"
    files = resources.files("gpo_fast")
    assert (files / "py.typed").is_file()
    assert any(entry.name.endswith(".html") for entry in (files / "report").iterdir())
    assert any(entry.name == "gpo-fast" for entry in metadata.distribution("gpo-fast").entry_points)

    cache = gpo_fast.PrefixCache(8, 4)
    sequence, hit = cache.open([1, 2, 3])
    assert hit == 0
    assert cache.reserve([sequence], 3)
    assert len(cache.append([sequence], [1, 2, 3], [3])) == 3
    cache.check_integrity()
    print(f"gpo-fast {gpo_fast.__version__} in {home.parent} is whole; CPU kernels: {gpo_fast._C.cpu_kernels()}")


if __name__ == "__main__":
    main()
