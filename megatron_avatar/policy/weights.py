"""Weights from and to Hugging Face folders of all families, one tensor at a time, under any tp and pp.

A folder may hold the full Omni class (names start with `thinker.`), the Thinker alone, or a VL, with names in the hub's
style or in the newer one. What the policy doesn't have (talker, vocoder) is copied through at export.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_avatar.config.asked import FILE
from megatron_avatar.config.families import family_of
from megatron_avatar.config.schema import LoraConfig
from megatron_avatar.policy.architecture import read_model_type
from megatron_avatar.policy.lora import lora_adapters
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.policy.safetensors_folder import (
    WHOLE,
    Entry,
    SafetensorsFolder,
    SafetensorsWriter,
    Shape,
    write_index,
)
from megatron_avatar.policy.slots import Slot, policy_slots

# Weights in other formats would be those from before the training; the talker's voices are no weights.
OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}
VOICES = "spk_dict.pt"
ADAPTERS = "adapter_model.safetensors"
Rename = Callable[[str], str]
Tensors = Iterator[tuple[str, Tensor]]


@torch.no_grad()
def load_hf(policy: OmniPolicy, folder: str | Path) -> None:
    """Fill this rank's parameters from `folder`, casting to their dtype. All ranks call it together.

    Raises ValueError, on all ranks alike, that names an unusable file, or every missing, unexpected or misshapen
    tensor. At most one parameter's tensors are in memory at a time.
    """
    used: set[str] = set()
    problems: set[str] = set()
    ours: set[str] = set()
    slots: list[tuple[Slot, list[str]]] = []  # with the names of what each is made of on this rank
    failure = None
    tp, tp_rank = policy.backend.tp, policy.backend.tp_rank
    try:  # by the files' headers alone: a folder of another model is refused before it is read
        source = SafetensorsFolder(folder)
        rename, belongs = naming(folder, source)
        ours = set(filter(belongs, source))
        for slot in policy_slots(policy):
            names = {rename(name): shape for name, shape in slot.shapes.items()}
            used |= names.keys()
            problems |= set(filter(None, (_problem(source, name, shape) for name, shape in names.items())))
            slots.append((slot, [rename(name) for name in slot.needed(tp, tp_rank)]))
        if policy.share_embeddings_and_output_weights:
            ours.discard(rename("lm_head.weight"))  # some writers store both names of the tied tensor
    except ValueError as error:
        failure = str(error)
    everywhere = policy.backend.all_gather_object((failure, used, problems))
    for failure, _, _ in everywhere:
        if failure:
            raise ValueError(failure)
    problems = problems.union(*(found for _, _, found in everywhere))
    problems |= {f"{name} is unexpected" for name in ours.difference(*(names for _, names, _ in everywhere))}
    _refuse(folder, problems, ours)
    try:
        for slot, needed in slots:
            slot.parameter.copy_(slot.take([source[name] for name in needed], tp, tp_rank))
    except ValueError as error:
        failure = str(error)
    if failures := list(filter(None, policy.backend.all_gather_object(failure))):
        raise ValueError(failures[0])


def _problem(source: SafetensorsFolder, name: str, shape: Shape) -> str:
    """What keeps a tensor of the folder from being taken; empty where nothing does."""
    if name not in source:
        return f"{name} is missing"
    entry = source.entries[name]
    if entry.shape != shape:
        return f"{name} has shape {list(entry.shape)} instead of {list(shape)}"
    if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:  # its scales lie elsewhere
        return f"{name} is {str(entry.dtype).removeprefix('torch.')}, quantized"
    return ""


def _refuse(folder: str | Path, problems: set[str], ours: set[str]) -> None:
    """ValueError that lists the problems of the folder's tensors, with the likely remedy; none where there are none."""
    if problems:
        listed = sorted(problems)
        more = f"; and {len(listed) - 8} more" if len(listed) > 8 else ""
        fused = any(name.endswith("experts.gate_up_proj") for name in ours)
        remedy = "Download it again"
        if fused:
            remedy = "Save its experts one by one, as transformers' save_pretrained does"
        elif any(problem.endswith("quantized") for problem in problems):
            remedy = "Take its edition in bfloat16"
        elif all(problem.endswith("lm_head.weight is missing") for problem in problems):
            remedy = "Write tie_word_embeddings true beside vision_config, where the head is the embedding"
        raise ValueError(
            f"the weights in {folder} don't match its config.json: {'; '.join(listed[:8])}{more}. {remedy}, or "
            "correct model.path"
        )


def export_hf(
    policy: OmniPolicy, folder: str | Path, source_folder: str | Path, dtype: torch.dtype | None = None,
    *, asked: dict[str, str] | None = None,
) -> None:
    """Write the policy as a Hugging Face folder of the class that `source_folder` has. All ranks call it together.

    Names, files, tokenizer and tensors outside the policy are the source's; adapters are merged into the weights;
    `dtype` (default: the policy's own) is written into config.json, `asked`, the words of the prompts that it was
    trained on, into a file of its own. The folder appears whole, in place of an older
    one. Raises OSError on all ranks where it can't be written.
    """
    dtype = dtype or policy.config.params_dtype
    merged = {id(adapter.slot.parameter): adapter.merged for adapter in lora_adapters(policy)}

    def value(slot: Slot) -> Tensor:
        merge = merged.get(id(slot.parameter))
        return merge() if merge else slot.parameter

    def write(aside: Path, shapes: dict[str, Shape], tensors: Tensors) -> None:
        _write_model(aside, Path(source_folder), shapes, tensors, dtype)
        _note(aside, asked)

    _export(policy, Path(folder), [slot for slot in policy_slots(policy) if not slot.duplicate], value, dtype, write)


def export_adapters(
    policy: OmniPolicy, folder: str | Path, source_folder: str | Path, lora: LoraConfig, *, towers: bool = False,
    hub: bool = False, asked: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """Write the adapters of `lora` as a PEFT folder for the model in `source_folder`. All ranks call it together.

    With `towers`, which were then trained beside the adapters, the encoders go with them (PEFT's modules_to_save).
    Layers are named as transformers 5 has them in its modules, with `hub` as the hub's folders have them: of
    Qwen2.5-Omni those are transformers 4's modules too, and vLLM reads them.
    Raises OSError on all ranks where it can't be written.
    """
    dtype = policy.config.params_dtype
    slots = [slot for adapter in lora_adapters(policy) for slot in (adapter.a_slot, adapter.b_slot)]
    if towers and policy.pre_process:
        own = {id(parameter) for parameter in policy.towers.parameters()}
        slots += [slot for slot in policy_slots(policy) if id(slot.parameter) in own]

    def write(aside: Path, shapes: dict[str, Shape], tensors: Tensors) -> None:
        _write_adapters(aside, Path(source_folder), shapes, tensors, dtype, lora, hub)
        _note(aside, asked)

    _export(policy, Path(folder), slots, lambda slot: slot.parameter, dtype, write)


# ----------------------------------------------------------------------------------------------------------------
# Names


def naming(folder: str | Path, source: SafetensorsFolder) -> tuple[Rename, Callable[[str], bool]]:
    """How the folder calls what the hub's Thinker folders call so, and which of its tensors are the policy's at all."""
    prefix = class_prefix(folder)
    if any(name.startswith(f"{prefix}model.language_model.") for name in source):
        return lambda name: prefix + nested(name), lambda name: name.startswith(prefix)
    return lambda name: prefix + name, lambda name: name.startswith(prefix)


def class_prefix(folder: str | Path) -> str:
    """What stands before the policy's names in the folder's class."""
    model_type = read_model_type(folder)
    return "thinker." if model_type == family_of(model_type).whole else ""


def nested(name: str) -> str:
    """The name in the newer style, transformers' own modules': encoders and language model are parts of `model`."""
    if name.startswith("model."):
        return name.replace("model.", "model.language_model.", 1)
    return name if name.startswith("lm_head.") else f"model.{name}"


# ----------------------------------------------------------------------------------------------------------------
# Writing


def _export(
    policy: OmniPolicy,
    folder: Path,
    slots: list[Slot],
    value: Callable[[Slot], Tensor],
    dtype: torch.dtype,
    write: Callable[[Path, dict[str, Shape], Tensors], None],
) -> None:
    """Gather the slots' values in `dtype` on rank 0 and let it `write` them aside, then rename."""
    backend = policy.backend
    if backend.dp_rank == 0:
        pp_group = parallel_state.get_pipeline_model_parallel_group()
        listings: list = [None] * backend.pp
        dist.all_gather_object(listings, {n: s for slot in slots for n, s in slot.shapes.items()}, pp_group)
        gathered = _gather(policy, slots, value, dtype, listings)
    else:
        gathered = iter(())
    outcome: list[str | None] = [None]
    if backend.rank == 0:
        try:
            with _replacing(folder) as aside:
                write(aside, {name: shape for listing in listings for name, shape in listing.items()}, gathered)
        except Exception as error:  # whatever it is, the other ranks wait for word of it
            outcome = [f"export to {folder} failed: {type(error).__name__}: {error}"]
    for _ in gathered:  # the other ranks send; after a failure rank 0 still takes what they have sent
        pass
    dist.broadcast_object_list(outcome, 0)
    if outcome[0]:
        raise OSError(outcome[0])


def put_away(folder: Path) -> OSError | None:
    """Take a folder out of sight under a name of its own, then delete it: half of it is never found.

    Returns why it couldn't be deleted: a file that another node has open (NFS) is no reason to end a run.
    """
    hidden = folder.with_name(f".unfinished_{folder.name.lstrip('.')}.{secrets.token_hex(4)}")
    folder.rename(hidden)
    try:
        shutil.rmtree(hidden)
    except OSError as error:
        return error
    return None


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block has gone well. At every moment one whole copy
    stands there or, between two renames, in FOLDER.old, from where the next attempt puts it back."""
    aside, old = (folder.with_name(f"{folder.name}.{what}") for what in ("writing", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (aside, old):
        if leftover.exists():
            put_away(leftover)
    aside.mkdir(parents=True)
    try:
        yield aside
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def _gather(
    policy: OmniPolicy,
    slots: list[Slot],
    value: Callable[[Slot], Tensor],
    dtype: torch.dtype,
    listings: list[dict[str, Shape]],
) -> Tensors:
    """Full Hugging Face tensors on the host of rank 0, stage by stage; the other ranks of its replica run through
    the same loop, send, and get nothing."""
    backend = policy.backend
    tp_group = parallel_state.get_tensor_model_parallel_group()
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    for stage, listing in enumerate(listings):
        if stage == backend.pp_rank:
            for slot in slots:
                own = value(slot).to(dtype)
                if slot.dim is not None and backend.tp > 1:
                    own = _collect(own, slot.dim, tp_group)
                if backend.tp_rank == 0:
                    for name, tensor in zip(slot.shapes, slot.join(own), strict=True):
                        if stage == 0:
                            yield name, tensor.cpu()
                        else:
                            dist.send(tensor, 0, pp_group)
        elif backend.rank == 0:
            source = dist.get_process_group_ranks(pp_group)[stage]
            for name, shape in listing.items():
                received = torch.empty(shape, dtype=dtype, device=backend.device)
                dist.recv(received, source, pp_group)
                yield name, received.cpu()


def _collect(own: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The ranks' parts put together along `dim` on the group's first; the others send theirs and keep it."""
    first, *others = dist.get_process_group_ranks(group)
    if group.rank():
        dist.send(own.contiguous(), first, group)
        return own
    shape = list(own.shape)
    shape[dim] *= group.size()
    full = own.new_empty(shape)
    for rank, part in zip((first, *others), full.chunk(group.size(), dim), strict=True):
        if rank == first:
            part.copy_(own)
        elif part.is_contiguous():
            dist.recv(part, rank, group)
        else:
            received = torch.empty_like(own, memory_format=torch.contiguous_format)
            dist.recv(received, rank, group)
            part.copy_(received)
    return full


def _write_model(
    aside: Path, source_folder: Path, shapes: dict[str, Shape], tensors: Tensors, dtype: torch.dtype
) -> None:
    """A folder like the source's, file by file, with the policy's tensors in place of its own."""
    source = SafetensorsFolder(source_folder)
    rename, belongs = naming(source_folder, source)
    ours = {rename(name): shape for name, shape in shapes.items()}
    for name, shape in ours.items():
        if name not in source or source.entries[name].shape != shape:
            raise ValueError(f"{source_folder} has no {name} of shape {list(shape)}: it is not the policy's source")
    entries = {name: entry._replace(dtype=dtype) if name in ours else entry for name, entry in source.entries.items()}
    entries = {name: entry for name, entry in entries.items() if name in ours or not belongs(name)}
    others = ((name, source[name]) for name in entries if name not in ours)
    _write_tensors(aside, entries, itertools.chain(((rename(name), tensor) for name, tensor in tensors), others))
    if {entry.file for entry in entries.values()} != {WHOLE}:
        write_index(aside, entries)
    for path in source_folder.iterdir():
        weights = path.suffix in OTHER_WEIGHTS and path.name != VOICES
        if path.is_file() and not weights and not path.name.endswith(".index.json") and path.name != "config.json":
            shutil.copyfile(path, aside / path.name)
    config = json.loads((source_folder / "config.json").read_text(encoding="utf-8"))
    own = config.get("thinker_config", config)
    nested = [own[key] for key in ("text_config", "vision_config", "audio_config") if key in own]
    for part in (config, own, *(part for part in nested if {"dtype", "torch_dtype"} & part.keys())):
        part["torch_dtype" if "torch_dtype" in part else "dtype"] = str(dtype).removeprefix("torch.")
    _write_json(aside / "config.json", config)


def _write_adapters(
    aside: Path, source_folder: Path, shapes: dict[str, Shape], tensors: Tensors, dtype: torch.dtype, lora: LoraConfig,
    hub: bool,
) -> None:  # fmt: skip
    """adapter_model.safetensors and adapter_config.json, for PEFT on the source's class in transformers."""
    prefix, family = class_prefix(source_folder), family_of(read_model_type(source_folder))
    style = (lambda name: name) if hub and not family.nested_names else nested
    layers = rf"{re.escape(prefix)}{re.escape(style('model.'))}layers"

    def rename(name: str) -> str:
        return f"base_model.model.{prefix}{style(name)}"

    # Of a fused layer's parts only those that were targeted: the others' B is zero.
    wanted = {name for name in shapes if "lora_B" not in name or name.split(".")[-3] in lora.targets}
    entries = {rename(name): Entry(ADAPTERS, shape, dtype) for name, shape in shapes.items() if name in wanted}
    _write_tensors(aside, entries, ((rename(name), tensor) for name, tensor in tensors if name in wanted))
    towers = sorted({name.split(".")[0] for name in shapes if not name.startswith("model.")})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(source_folder),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        # In full, because the encoders and the talker have layers of the same names.
        "target_modules": rf"{layers}\.\d+\.\w+\.({'|'.join(lora.targets)})",
        "modules_to_save": towers or None,
        "inference_mode": True,
    }
    _write_json(aside / "adapter_config.json", config)


def _write_tensors(folder: Path, entries: dict[str, Entry], tensors: Tensors) -> None:
    writer = SafetensorsWriter(folder, entries)
    try:
        for name, tensor in tensors:
            writer.write(name, tensor)
        writer.finish()
    finally:
        writer.close()


def _note(folder: Path, asked: dict[str, str] | None) -> None:
    """Write down with which words a model was trained; the source's note stays where this isn't known."""
    if asked is not None:
        _write_json(folder / FILE, asked)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
