"""Where training data and weights are published, how large they are, and the command that fetches them."""

from __future__ import annotations

from megatron_avatar.config.paths import MODELS, NAMES, fetch, variable

# source= -> its name on the hub, what it is, what of it is known.
DATASETS = {
    "avatar_rl": ("yogkul2000/AVATAR-RL-dataset", "AVATAR's stages 0 to 3, audio-visual",
                  "its card and sizes were not found: look at them before you fetch it"),
    "vision_r1_rl": ("Osilly/Vision-R1-rl", "mathematics on pictures, about 10,000 rows of parquet with their pictures",
                     "CC BY-NC-SA 4.0"),
    "video_r1": ("Video-R1/Video-R1-data", "video and picture questions, a part with reasoning traces",
                 "lists of JSON, the media in archives to unpack beside them"),
}  # fmt: skip


def show() -> int:
    """Print data sets and models."""
    for source, (hub, what, note) in DATASETS.items():
        print(f"source={source}: {what} ({note})\n  {fetch(hub, dataset=True)}")
    print("source=mapping: any other form; data_tools/prepare/mapping_example.yaml says how\n")
    for model in MODELS.values():
        print(f"{NAMES[model.key].removeprefix('the folder of ')}, {model.gigabytes} GB: {fetch(model.hub)}\n"
              f"  then export {variable(model.key)}=models/{model.hub.rpartition('/')[2]}")  # fmt: skip
    print("\nThen: .venv/bin/python -m data_tools.prepare source=avatar_rl input=data/AVATAR-RL-dataset "
          f"out=data/avatar model=models/Qwen2.5-Omni-7B\n  and export {variable('data')}=data/avatar/manifest.jsonl. "
          "On a cluster: sbatch slurm/prepare.sh with the same words. Terms are their owners'.")  # fmt: skip
    return 0
