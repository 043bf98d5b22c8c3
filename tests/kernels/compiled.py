"""Compile every kernel variant for real GPUs, on a machine that need not have one.

    python -m tests.kernels.compiled [MODULE ...] [--arch 80] [--save FOLDER]

prints one JSON line per variant and architecture: registers, stack, local and shared memory as cuobjdump reads them from the
cubin, and what stands in PTX. An interpreted kernel cannot be compiled, so tests start this file as a process of its own. --save
writes PTX and SASS, to be read.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import tempfile
from pathlib import Path

ARCHS = (80, 90)  # A100, H100 and H200
MAX_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that one block may have
TYPES = {"bf16", "fp16", "fp32", "fp64", "i1", "i8", "u8", "i16", "i32", "u32", "i64"}


def modules_with_variants() -> list[str]:
    """Names of the kernel modules that list variants."""
    import sparsevila_kernels as package

    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"{package.__name__}.{name}"), "VARIANTS")]


def variants_of(module: str) -> list:
    return importlib.import_module(f"sparsevila_kernels.{module}").VARIANTS


def source_of(variant):
    """Triton's AST source of one variant, with the alignment that its signature states."""
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    for position, name in enumerate(variant.kernel.arg_names):
        if name in variant.constexprs:
            signature[name] = "constexpr"
            continue
        if name not in variant.signature:
            raise ValueError(f"{variant.kernel.__name__}: the variant gives no type for {name}")
        kind, _, divisor = variant.signature[name].partition(":")
        if kind.removeprefix("*") not in TYPES or divisor not in ("", "16"):
            raise ValueError(f"{variant.kernel.__name__}: {name} has the type {variant.signature[name]!r}")
        signature[name] = kind
        if divisor:
            aligned[(position,)] = [["tt.divisibility", 16]]
    strangers = {*variant.signature, *variant.constexprs} - {*variant.kernel.arg_names}
    if strangers:
        raise ValueError(f"{variant.kernel.__name__}: has no arguments {sorted(strangers)}")
    return ASTSource(variant.kernel, signature, constexprs=dict(variant.constexprs), attrs=aligned)


def usage_of(cubin: bytes) -> dict[str, int]:
    """{"REG": ..., "STACK": ..., "LOCAL": ..., "SHARED": ...} of the one kernel in a cubin."""
    text = run_on(cubin, "cuobjdump", "--dump-resource-usage")
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    if not {"REG", "STACK", "LOCAL"} <= found.keys():
        raise ValueError(f"cuobjdump says nothing of registers: {text[:300]!r}")
    return found


def run_on(cubin: bytes, tool: str, *flags: str) -> str:
    import triton.backends.nvidia as nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(Path(nvidia.__file__).parent / "bin" / tool), *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_variant(module: str, index: int, arch: int, save: Path | None = None) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget

    variant = variants_of(module)[index]
    options = {"enable_fp_fusion": True, **variant.options}
    compiled = triton.compile(source_of(variant), target=GPUTarget("cuda", arch, 32), options=options)
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    usage = usage_of(cubin)
    name = f"{module}-{index}-{variant.kernel.__name__}-sm{arch}"
    if save is not None:
        (save / f"{name}.ptx").write_text(ptx)
        (save / f"{name}.sass").write_text(run_on(cubin, "nvdisasm", "-c"))
    return {
        "module": module,
        "name": name,
        "types": dict(variant.signature),
        "constexprs": {key: str(value) for key, value in variant.constexprs.items()},
        "arch": arch,
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "local_bytes": usage["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4|cp\.async\.c\S+ .*?0x10\b", ptx)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*")
    parser.add_argument("--arch", type=int, action="append")
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"  # read when the kernels are imported, below: to be compiled, though there may be no GPU
    if args.save is not None:
        args.save.mkdir(parents=True, exist_ok=True)
    for module in args.modules or modules_with_variants():
        for index in range(len(variants_of(module))):
            for arch in args.arch or ARCHS:
                print(json.dumps(compile_variant(module, index, arch, args.save)), flush=True)


if __name__ == "__main__":
    main()
