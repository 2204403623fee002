"""The README.md of a trained model: how it was made, what it is made of, and what to cite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

import gpo_fast

BASE_CITATIONS = {  # loss_type: arXiv number of the base algorithm
    "grpo": "2402.03300",
    "awr": "1910.00177",
    "ppo": "1707.06347",
    "bnpo": "2402.03300",
    "dr_grpo": "2503.20783",
    "dapo": "2503.14476",
    "gspo": "2507.18071",
    "cispo": "2506.13585",
    "rloo": "2402.14740",
    "dpo": "2305.18290",
    "kto": "2402.01306",
    "simpo": "2405.14734",
    "orpo": "2403.07691",
}
TEXT = """\
# {name}

{origin}, made with gpo-fast {version}: {algorithm}.

## Training

| option | value |
| --- | --- |
{options}
"""
GPO_TEXT = """
Guided Pivotal Optimization finds the critical step of a trajectory by sampling continuations from its steps, resets
the policy to it, and learns from the rollouts that start there.

## Citation

```bibtex
{citation}
```
"""
PAPER = {
    "title": "GPO: Learning from Critical Steps to Improve LLM Reasoning",
    "id": "2509.16456",
    "citation": """\
@inproceedings{yu2025gpo,
  title     = {GPO: Learning from Critical Steps to Improve LLM Reasoning},
  author    = {Yu and Cheng and Wu and Xing},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025},
  url       = {https://arxiv.org/abs/2509.16456}
}""",
}


def model_card(
    name: str,
    *,
    base_model: str,
    loss_type: str,
    use_gpo: bool,
    options: dict[str, Any],
    is_adapter: bool,
    tags: Sequence[str] = (),
    **data: Any,
) -> str:
    """The text of a model card with its header.

    Args:
        base_model: path or hub id of the model that was trained; only an id is put into the header.
        options: what was set, for the table.
        data: further fields of the header (`language`, `license`, `datasets`, ...).
    """
    if Path(base_model).exists():
        base_model = Path(base_model).name  # where it lay on this machine is nobody's business; '' is a folder, too
    else:
        data["base_model"] = base_model
    header = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["gpo-fast", *(["gpo"] if use_gpo else []), loss_type, *tags])),
        **data,
    )
    base = f"[{loss_type}](https://arxiv.org/abs/{BASE_CITATIONS[loss_type]})"
    text = TEXT.format(
        name=name,
        origin=f"{'An adapter of' if is_adapter else 'Trained from'} {f'`{base_model}`' if base_model else 'a model'}",
        version=gpo_fast.__version__,
        algorithm=f"[GPO](https://arxiv.org/abs/{PAPER['id']}) on {base}" if use_gpo else base,
        options="\n".join(f"| `{key}` | `{_cell(value)}` |" for key, value in options.items()),
    )
    searched = GPO_TEXT.format(citation=PAPER["citation"]) if use_gpo else ""
    return f"---\n{header.to_yaml()}\n---\n\n{text}{searched}"


def _cell(value: Any) -> str:
    """A value as one cell of a table."""
    return str(value).replace("|", "\\|").replace("`", "'").replace("\n", "\\n")[:200]
