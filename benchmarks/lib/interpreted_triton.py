"""Triton's interpreter without work whose results nobody uses, which is half of its time. The kernels' results are the same bits.

- It replaces some four hundred members of `triton.language`, which it looks up, for each launch and again for each device function
  that a kernel calls. They are the same each time, and while a kernel runs they are replaced already.
- It computes integers twice to see an overflow, and passes what it saw to an assertion that is off.
- It makes a table of all dtypes for each operation.

Where Triton's interpreter does not look as it does in 3.9, nothing is done.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

MODULE = "triton.runtime.interpreter"
NEEDED = ("_patch_lang", "_patch_builtin", "_patch_attr", "_LangPatchScope", "_get_np_dtype", "interpreter_builder", "tl")


def prepare_once() -> None:
    """Do so if the interpreter has been imported and was not prepared before."""
    interpreter: Any = sys.modules.get(MODULE)
    if interpreter is None or hasattr(interpreter, "_prepared") or not all(hasattr(interpreter, name) for name in NEEDED):
        return
    interpreter._prepared = True
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    tl, patch_lang, make_numpy_dtype = interpreter.tl, interpreter._patch_lang, interpreter._get_np_dtype
    builtins: dict[Any, list[tuple[str, Any]]] = {}
    numpy_dtypes: dict[str, Any] = {}
    replaced: set[str] = set()  # modules whose members are replaced until the kernel that runs has ended

    def numpy_dtype(kind: Any) -> Any:
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        if type(element) is not tl.dtype:  # a pointer
            return make_numpy_dtype(kind)
        if element.name not in numpy_dtypes:
            numpy_dtypes[element.name] = make_numpy_dtype(element)
        return numpy_dtypes[element.name]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        if package not in builtins:
            builtins[package] = [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
        for name, member in builtins[package]:
            interpreter._patch_attr(package, name, member, builder, scope)

    def patch(function: Any) -> Any:
        modules = {value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core}
        if modules <= replaced:
            return interpreter._LangPatchScope()
        scope = patch_lang(function)
        if not replaced:
            restore = scope.restore

            def end() -> None:
                replaced.clear()
                restore()

            scope.restore = end
        replaced.update(modules)
        return scope

    interpreter._get_np_dtype = numpy_dtype
    interpreter._patch_builtin = patch_builtin
    interpreter._patch_lang = patch
