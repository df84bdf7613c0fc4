"""Compiles the kernels for a Hopper GPU, which needs none; run as a program, outside Triton's interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from sidecast.predictors.nino import triton_features, triton_kernels, triton_tiles

HOPPER = GPUTarget("cuda", 90, 32)
SIZES = {"num_targets", "num_sources", "target_stride", "source_stride", "kernel_stride", "plane_stride"}


def ptx(kernel: object, constants: dict[str, object], bf16: set[str], options: dict[str, int]) -> str:
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):  # type: ignore[attr-defined]
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = "*bf16" if name in bf16 else "*fp32"
        signature[name] = "i32" if name in SIZES else "fp32" if name in {"mean", "inverse"} else pointer
        if signature[name] != "fp32":
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return str(compile(source, target=HOPPER, options=options).asm["ptx"])


def main(folder: Path) -> None:
    for precision in triton_kernels.PRECISIONS:
        shape = triton_kernels.TritonKernels(precision, 5).shape
        constants: dict[str, object] = triton_kernels.precision_constants(precision) | {
            "X": 5,
            "X_PADDED": 16,
            "C": 5,
            "D": 128,
            "COMPILED": True,
            "BLOCK_T": shape.block_targets,
            "GROUP_S": shape.group_sources,
        }
        weights = {"first_XD", "later_LDD", "scale_DD"} if precision == "bf16" else set()
        options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
        one = {"NUM_LAYERS": 1, "LAYERS_WITH_SOURCE": 1, "LAYERS_WITH_TARGET": 1}
        three = {"NUM_LAYERS": 3, "LAYERS_WITH_SOURCE": 3, "LAYERS_WITH_TARGET": 3, "F": 1}
        sums = ptx(triton_tiles.message_sums_kernel, constants | one, weights, options)
        (folder / f"message_sums_{precision}.ptx").write_text(sums)
        changes = ptx(triton_tiles.changes_kernel, constants | three, weights, options)
        (folder / f"changes_{precision}.ptx").write_text(changes)
    tile = {"BLOCK_T": 64, "BLOCK_S": 64}
    features = ptx(triton_features._scaled_plane_kernel, dict(tile), {"state_TSF"}, {})
    (folder / "scaled_plane.ptx").write_text(features)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
