"""Weights from and to Hugging Face folders of Qwen2.5-Omni, one tensor at a time, under any tp and pp.

The folder may hold the full Omni class (names start with `thinker.`) or the Thinker alone, in one safetensors file
or in shards with an index. What the policy doesn't have (talker, vocoder) is copied through at export.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_avatar.policy.architecture import read_model_type
from megatron_avatar.policy.model import OmniPolicy

SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """A parameter of this rank and the Hugging Face tensors that it is made of.

    The tensors are cut into `blocks` along dimension 0 and stacked block by block: per query group for q, k, v, per
    rank for gate and up. The result is split over the ranks along `dim`; None: every rank has all of it.
    """

    parameter: Tensor
    shapes: dict[str, Shape]
    dim: int | None = None
    blocks: int = 1
    duplicate: bool = False  # another stage exports it

    def take(self, tensors: list[Tensor], tp: int, tp_rank: int) -> Tensor:
        """This rank's part of full Hugging Face tensors."""
        full = torch.cat([tensor.unflatten(0, (self.blocks, -1)) for tensor in tensors], dim=1).flatten(0, 1)
        if self.dim is None:
            return full
        size = self.parameter.shape[self.dim]
        if self.dim == 0:  # only the vocabulary is padded
            full = F.pad(full, (0, 0) * (full.dim() - 1) + (0, size * tp - len(full)))
        return full.narrow(self.dim, tp_rank * size, size)

    def join(self, shares: list[Tensor]) -> Iterator[Tensor]:
        """The full Hugging Face tensors of the parts of all tensor-parallel ranks."""
        rows = [shape[0] for shape in self.shapes.values()]
        full = (shares[0] if self.dim is None else torch.cat(shares, self.dim))[: sum(rows)]
        parts = full.unflatten(0, (self.blocks, -1)).split([count // self.blocks for count in rows], dim=1)
        return (part.flatten(0, 1).contiguous() for part in parts)


def policy_slots(policy: OmniPolicy) -> list[Slot]:
    """All parameters of this rank, with Hugging Face names as a Thinker's folder has them."""
    text, tp, gpt = policy.hf_config.text_config, policy.backend.tp, policy.language_model
    hidden, vocabulary = text.hidden_size, (policy.vocab_size, text.hidden_size)
    groups, size = text.num_key_value_heads, policy.config.kv_channels
    qkv = {"q_proj": text.num_attention_heads * size, "k_proj": groups * size, "v_proj": groups * size}
    slots = []
    if policy.pre_process:
        for tower in ("visual", "audio_tower"):
            for name, parameter in getattr(policy.towers, tower).named_parameters():
                slots.append(Slot(parameter, {f"{tower}.{name}": tuple(parameter.shape)}))
        slots.append(Slot(gpt.embedding.word_embeddings.weight, {"model.embed_tokens.weight": vocabulary}, dim=0))
    for layer in gpt.decoder.layers:
        prefix, attention, mlp = f"model.layers.{layer.layer_number - 1}.", layer.self_attention, layer.mlp
        weights = {f"{prefix}self_attn.{name}.weight": (rows, hidden) for name, rows in qkv.items()}
        biases = {f"{prefix}self_attn.{name}.bias": (rows,) for name, rows in qkv.items()}
        gate_up = {f"{prefix}mlp.{name}.weight": (text.intermediate_size, hidden) for name in ("gate_proj", "up_proj")}
        output = {f"{prefix}self_attn.o_proj.weight": (hidden, qkv["q_proj"])}
        down = {f"{prefix}mlp.down_proj.weight": (hidden, text.intermediate_size)}
        slots += [
            Slot(layer.input_layernorm.weight, {f"{prefix}input_layernorm.weight": (hidden,)}),
            Slot(attention.linear_qkv.weight, weights, dim=0, blocks=groups),
            Slot(attention.linear_qkv.bias, biases, dim=0, blocks=groups),
            Slot(attention.linear_proj.weight, output, dim=1),
            Slot(layer.pre_mlp_layernorm.weight, {f"{prefix}post_attention_layernorm.weight": (hidden,)}),
            Slot(mlp.linear_fc1.weight, gate_up, dim=0, blocks=tp),
            Slot(mlp.linear_fc2.weight, down, dim=1),
        ]
    if policy.post_process:
        slots.append(Slot(gpt.decoder.final_layernorm.weight, {"model.norm.weight": (hidden,)}))
        if not policy.share_embeddings_and_output_weights:
            slots.append(Slot(gpt.output_layer.weight, {"lm_head.weight": vocabulary}, dim=0))
        elif not policy.pre_process:  # tied over pipeline stages: the last one holds a copy
            slots.append(Slot(gpt.output_layer.weight, {"model.embed_tokens.weight": vocabulary}, 0, duplicate=True))
    return slots


class HfTensors:
    """The tensors of a Hugging Face folder by name, read on demand. Raises ValueError that names the file at fault."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = ExitStack()
        index = self.folder / INDEX
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            names = ["model.safetensors"]
        self._where = {}
        for name in names:
            try:
                file = self._files.enter_context(safe_open(self.folder / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                path = self.folder / name
                raise ValueError(f"{path} can't be read ({error}): download or export it again") from error
            self._where.update(dict.fromkeys(file.keys(), file))

    def __enter__(self) -> HfTensors:
        return self

    def __exit__(self, *exception) -> None:
        self._files.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> Shape:
        return tuple(self._where[name].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)


@torch.no_grad()
def load_hf(policy: OmniPolicy, folder: str | Path) -> None:
    """Fill this rank's parameters from `folder`, casting to their dtype. All ranks call it together.

    Raises ValueError, on all ranks alike, that names every missing, unexpected or misshapen tensor.
    """
    prefix, tp, tp_rank = name_prefix(folder), policy.backend.tp, policy.backend.tp_rank
    problems, used = [], set()
    with HfTensors(folder) as source:
        for slot in policy_slots(policy):
            names = {prefix + name: shape for name, shape in slot.shapes.items()}
            used.update(names)
            missing = [f"{name} is missing" for name in names if name not in source]
            misshapen = [
                f"{name} has shape {list(source.shape(name))} instead of {list(shape)}"
                for name, shape in names.items()
                if name in source and source.shape(name) != shape
            ]
            problems += missing + misshapen
            if not missing and not misshapen:
                slot.parameter.copy_(slot.take([source[name] for name in names], tp, tp_rank))
        ours = {name for name in source if name.startswith(prefix)}
    if policy.share_embeddings_and_output_weights:
        ours.discard(f"{prefix}lm_head.weight")  # some writers store both names of the tied tensor
    everywhere = policy.backend.all_gather_object((used, problems))
    problems = {problem for _, found in everywhere for problem in found}
    problems |= {f"{name} is unexpected" for name in ours.difference(*(names for names, _ in everywhere))}
    if problems:
        listed = sorted(problems)
        more = f"; and {len(listed) - 8} more" if len(listed) > 8 else ""
        raise ValueError(f"the weights in {folder} don't match its config.json: {'; '.join(listed[:8])}{more}")


def export_hf(
    policy: OmniPolicy, folder: str | Path, source_folder: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Write the policy as a Hugging Face folder of the class that `source_folder` has. All ranks call it together.

    Tokenizer files and tensors outside the policy are copied from the source; `dtype` (default: the policy's own) is
    written into config.json. The folder appears by one rename, in place of an older one. Raises OSError on all ranks
    where it can't be written.
    """
    backend = policy.backend
    gathered = _gather(policy, dtype or policy.config.params_dtype) if backend.dp_rank == 0 else iter(())
    outcome = [None]
    if backend.rank == 0:
        try:
            _write_folder(gathered, Path(folder), Path(source_folder), dtype or policy.config.params_dtype)
        except (OSError, ValueError, SafetensorError) as error:
            outcome = [f"export to {folder} failed: {error}"]
            shutil.rmtree(_aside(Path(folder)), ignore_errors=True)
    for _ in gathered:  # the other ranks send; after a failure rank 0 still takes what they have sent
        pass
    dist.broadcast_object_list(outcome, 0)
    if outcome[0]:
        raise OSError(outcome[0])


def name_prefix(folder: str | Path) -> str:
    """What stands before a Thinker's tensor names in this folder."""
    return "thinker." if read_model_type(folder) == "qwen2_5_omni" else ""


@torch.no_grad()
def _gather(policy: OmniPolicy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Full Hugging Face tensors on the host of rank 0, stage by stage; the other ranks of its replica run through
    the same loop, send, and get nothing."""
    backend = policy.backend
    tp_group = parallel_state.get_tensor_model_parallel_group()
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    slots = [slot for slot in policy_slots(policy) if not slot.duplicate]
    listings: list = [None] * backend.pp
    dist.all_gather_object(listings, [item for slot in slots for item in slot.shapes.items()], pp_group)
    for stage, listing in enumerate(listings):
        if stage == backend.pp_rank:
            for slot in slots:
                own = slot.parameter.detach().to(dtype)
                shares = [own]
                if slot.dim is not None:
                    shares = [torch.empty_like(own) for _ in range(backend.tp)]
                    dist.all_gather(shares, own.contiguous(), tp_group)
                if backend.tp_rank == 0:
                    for name, tensor in zip(slot.shapes, slot.join(shares), strict=True):
                        if stage == 0:
                            yield name, tensor.cpu()
                        else:
                            dist.send(tensor, 0, pp_group)
        elif backend.rank == 0:
            for name, shape in listing:
                received = torch.empty(shape, dtype=dtype, device=backend.device)
                dist.recv(received, dist.get_process_group_ranks(pp_group)[stage], pp_group)
                yield name, received.cpu()


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.writing")


def _write_folder(tensors: Iterable[tuple[str, Tensor]], folder: Path, source: Path, dtype: torch.dtype) -> None:
    """Write aside, then rename."""
    aside, old = _aside(folder), folder.with_name(f"{folder.name}.old")
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    prefix = name_prefix(source)
    with HfTensors(source) as source_tensors:
        ours = ((prefix + name, tensor) for name, tensor in tensors)
        others = ((name, source_tensors[name]) for name in source_tensors if not name.startswith(prefix))
        _write_tensors(itertools.chain(ours, others), aside)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX, "config.json"):
            shutil.copyfile(path, aside / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("thinker_config", {})):
        part["torch_dtype" if "torch_dtype" in part else "dtype"] = str(dtype).removeprefix("torch.")
    (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_tensors(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write safetensors shards of at most SHARD_BYTES, with an index where there are several."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    weight_map = {}
    for number, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
