"""Compile every kernel at 7B's and 3B's shapes for sm_80, sm_89 and sm_90, in bfloat16, float16 and float32, with the
warps that launches use, without a GPU; prints their sizes as JSON. Heads of 80 are computed in blocks of 128, as those
of 128 are; those of 64 in blocks of their own, and few queries in blocks of 16. Named variants alone where arguments
are given: `"attend fp32 sm_89"`."""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_avatar.policy.kernels import attend, draw, head, merge, norm, rope, swiglu

HALF, FULL, INTS, LONGS, DOUBLES = "*bf16", "*fp32", "*i32", "*i64", "*fp64"


def source(kernel, types, constants):
    """`types` in the order of the kernel's arguments that are not constexpr."""
    names = [name for name in kernel.arg_names if name not in constants]
    assert len(names) == len(types), (kernel.fn.__name__, names)
    signature = {name: "constexpr" if name in constants else types[names.index(name)] for name in kernel.arg_names}
    return ASTSource(fn=kernel, signature=signature, constexprs={(kernel.arg_names.index(n),): v
                                                                 for n, v in constants.items()})  # fmt: skip


SPLIT = [HALF, FULL, *[HALF] * 5, "fp32", *["i32"] * 4]
DECODE = [HALF, FULL, HALF, HALF, HALF, LONGS, HALF, HALF, "fp32", *["i32"] * 5]
KERNELS = {
    "norm": (norm._forward_kernel, [HALF, FULL, HALF, FULL, HALF, "i32", "fp32"], dict(ADDS=True, BLOCK=4096)),
    "norm_backward": (norm._backward_kernel, [HALF, FULL, FULL, HALF, FULL, FULL, "i32", "i32", "fp32"],
                      dict(ADDS=True, ROWS=64, BLOCK=4096)),
    "swiglu": (swiglu._forward_kernel, [HALF, HALF, "i32"], dict(BLOCK=1024)),
    "swiglu_backward": (swiglu._backward_kernel, [HALF, HALF, HALF, "i32"], dict(BLOCK=1024)),
    "split_rope": (rope._split_kernel, SPLIT, dict(BACK=False, NORMS=False, BLOCK=64)),
    "split_norm_rope": (rope._split_kernel, SPLIT, dict(BACK=False, NORMS=True, BLOCK=64)),
    "split_rope_backward": (rope._split_kernel, SPLIT, dict(BACK=True, NORMS=False, BLOCK=64)),
    "split_norm_rope_backward": (rope._split_back_kernel, [HALF, FULL, *[HALF] * 6, FULL, "fp32", *["i32"] * 4],
                                 dict(TOKENS=16, BLOCK=64)),
    "decode_rope": (rope._decode_kernel, DECODE, dict(NORMS=False, BLOCK=64)),
    "decode_norm_rope": (rope._decode_kernel, DECODE, dict(NORMS=True, BLOCK=64)),
    "attend": (attend._parts_kernel, [*[HALF] * 5, *[LONGS] * 5, FULL, FULL, *["i32"] * 9, "fp32"],
               dict(STRETCH=512, KEYS=64, QUERIES=64, QUERY_BLOCKS=1, SIZE=128)),
    "merge": (attend._merge_kernel, [FULL, FULL, LONGS, LONGS, HALF, *["i32"] * 4], dict(STRETCH=512, SIZE=128)),
    "merge_parts": (merge._merge_kernel, [HALF, FULL, HALF, FULL, FULL, LONGS, *["i32"] * 7],
                    dict(LISTED=True, BLOCK=4096)),
    "draw_stats": (draw._stats_kernel, [FULL, "*i1", FULL, DOUBLES, DOUBLES, INTS, "i32", "fp32", "i32"],
                   dict(BLOCK=2048)),
    "draw_find": (draw._find_kernel, [FULL, "*i1", DOUBLES, FULL, DOUBLES, DOUBLES, INTS, LONGS, FULL, "i32", "fp32",
                                      "i32"], dict(GREEDY=False, BLOCK=2048, BLOCKS=128)),
    "head": (head._add_kernel, [FULL, FULL, LONGS, "i32", "i32", "i32", "fp32"], dict(BLOCK=4096)),
    "head_backward": (head._gradient_kernel, [FULL, LONGS, FULL, FULL, HALF, "i32", "i32", "fp32"], dict(BLOCK=4096)),
}  # fmt: skip

WARPS = {"norm": norm.WARPS, "norm_backward": norm.WARPS, "merge": attend.MERGE_WARPS, "merge_parts": merge.WARPS,
         **{name: rope.WARPS for name in KERNELS if "rope" in name}}  # fmt: skip  # else Triton's four
OTHERS = {"SIZE": 64, "QUERIES": 16}  # of attention; the rotation's halves of heads are 64 or 32
DTYPES = {"*bf16": "bf16", "*fp16": "fp16", "*fp32": "fp32"}


def variants():
    """(name, kernel, types, constants) of everything that a GPU may be asked to run."""
    for name, (kernel, types, constants) in KERNELS.items():
        shapes = [constants, *({**constants, key: value} for key, value in OTHERS.items() if key in constants)]
        if "rope" in name:
            shapes.append({**constants, "BLOCK": 32})
        for number, shape in enumerate(shapes):
            said = " ".join(f"{key}={shape[key]}" for key in shape if number and shape[key] != constants[key])
            for dtype, title in DTYPES.items() if HALF in types else [(FULL, "fp32")]:
                used = dict(shape)
                if "KEYS" in shape:
                    used["QUERIES"], used["KEYS"] = attend.blocks(4 if dtype == FULL else 2, shape["QUERIES"])
                yield f"{name} {title} {said}".strip(), kernel, [dtype if t == HALF else t for t in types], used


if __name__ == "__main__":
    found, wanted = {}, sys.argv[1:]
    for architecture in (80, 89, 90):
        for name, kernel, types, constants in variants():
            title = f"{name} sm_{architecture}"
            if wanted and title not in wanted:
                continue
            made = triton.compile(source(kernel, types, constants), target=GPUTarget("cuda", architecture, 32),
                                  options={"num_warps": WARPS.get(name.split()[0], 4)})  # fmt: skip
            found[title] = {"shared": made.metadata.shared, "cubin": len(made.asm["cubin"])}
    print(json.dumps(found))
