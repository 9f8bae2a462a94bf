"""A model under lmms-eval: lmms-eval asks and scores, the training engine answers.

    python -m eval.lmms model=FOLDER recipe=avatar_7b [key=value ...] -- --tasks worldsense,omni_bench \
        --gen_kwargs max_new_tokens=2048 --batch_size 16 --log_samples --output_path runs/lmms

    model=FOLDER   a Hugging Face folder: a whole Qwen2.5-Omni, its Thinker alone as runs export it, Qwen2.5-VL or
                   Qwen3-VL
    media=FOLDER   where measured media are kept for the next run; on several nodes it must be shared (a temporary one)

Prompts are the task's own, without the recipe's data.instruction unless it is written here.
Other settings are the recipe's; rl.sampling.max_new_tokens bounds what a task asks for. Behind -- stand lmms-eval's own
arguments. Under torchrun or srun the processes share the documents, in any layout of the recipe.

What lmms-eval gets is the answer without its tags: several of its parsers miss a letter between tags.
"""

from __future__ import annotations

import sys

from eval.lmms_engine import Responder
from megatron_avatar.config import load_config
from megatron_avatar.config.checks import check_family

INSTALL = "pip install --no-deps -r requirements-lmms.txt"


def main(arguments: list[str]) -> int:
    """Run lmms-eval with this model from the command line; returns the exit status."""
    own, theirs = arguments, []
    if "--" in arguments:
        own, theirs = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    settings = dict(item.partition("=")[::2] for item in own)
    model, media = settings.pop("model", ""), settings.pop("media", "")
    settings.setdefault("data.instruction", "")
    if not model or not theirs:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        import lmms_eval.__main__ as lmms_eval
    except ImportError as error:
        print(f"error: lmms-eval can't be imported ({error}): {INSTALL}", file=sys.stderr)
        return 2
    from lmms_eval.models import MODEL_REGISTRY_V2, ModelManifest

    from eval import lmms_model

    try:
        config = load_config([*(f"{key}={value}" for key, value in settings.items()), f"model.path={model}",
                              "data.manifest=-", "output_dir=-"])  # fmt: skip
        check_family(config)
        responder = Responder(config, media)  # before lmms-eval, which uses the process group that it finds
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lmms_model.MegatronAvatar.responder = responder
    MODEL_REGISTRY_V2.register_manifest(
        ModelManifest("megatron_avatar", simple_class_path=f"{lmms_model.__name__}.MegatronAvatar")
    )
    sys.argv = ["lmms-eval", "--model", "megatron_avatar", "--model_args", f"model={model}", *theirs]
    try:
        lmms_eval.cli_evaluate()
    finally:
        responder.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
