"""What the pickle of a PyTorch file asks for, found by reading its instructions and carrying out none.

`torch.load(weights_only=True)` runs no code either, but believes what the pickle claims: a storage larger than the
file, or a tensor larger than its storage. Here every claim is held against what is there, and whatever could make
reading take longer than the file is long (PyTorch's own files have none of it) is refused.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from weaver.concepts.formats.untrusted import Refusal

__all__ = ["scan_pickle"]

_SIZES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1}
_STORAGES = {f"torch {name}Storage": size for name, size in _SIZES.items()} | {"torch BoolStorage": 1}
_ORDERED = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_PARAMETERS = "torch.nn.modules.container ParameterDict"
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LONGEST = 64  # entries of a tuple; PyTorch writes six for a tensor
_MARK, _CONTAINER = object(), object()


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    nbytes: int
    itemsize: int


def scan_pickle(stream: BinaryIO, claim: Callable[[str, int], None]) -> object:
    """Follow one pickle to its end without building what it describes.

    Parameters
    ----------
    stream : at the start of the pickle; afterwards behind it
    claim : called with key and bytes of each storage that the pickle names; raises `Refusal` for one that is not there

    Returns the value where it is a number, a text or None. Raises `Refusal`, and what `pickletools` and a stack that
    runs empty raise for a damaged pickle.
    """
    stack: list[object] = []
    memo: dict[int, object] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append(_CONTAINER)
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _TUPLES or name == "TUPLE":
            items = _popped(stack, _TUPLES.get(name))
            if len(items) > _LONGEST:
                raise Refusal(f"it has a tuple of {len(items)}, which no concept file has")
            stack.append(tuple(items))
        elif name in ("APPEND", "APPENDS"):
            _popped(stack, 1 if name == "APPEND" else None)
        elif name in ("SETITEM", "SETITEMS"):
            keys = _popped(stack, 2 if name == "SETITEM" else None)[::2]
            if not all(isinstance(key, str | int) for key in keys):
                raise Refusal("it has names that are neither text nor numbers")
        elif name == "BUILD":  # attributes of an OrderedDict, as a state dict's `_metadata`
            stack.pop()
        elif name == "GLOBAL":
            stack.append(_known(argument))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), claim))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_called(function, arguments))
        elif name not in ("PROTO", "STOP"):
            raise Refusal(f"its pickle has the instruction {name}, which PyTorch does not write: save it again")
    return stack[-1] if isinstance(stack[-1], str | int | float) else None


def _popped(stack: list[object], count: int | None) -> list[object]:
    """The topmost `count` entries, or those above the last mark and the mark; they leave the stack."""
    if count is None:
        count = 0
        while stack[-1 - count] is not _MARK:
            count += 1
        items = stack[len(stack) - count :]
        del stack[len(stack) - count - 1 :]
        return items
    if len(stack) < count:
        raise IndexError("the stack is empty")
    items = stack[-count:]
    del stack[-count:]
    return items


def _known(name: str) -> _Global:
    if name not in _STORAGES and name not in (_ORDERED, _TENSOR, _PARAMETER):
        if name == _PARAMETERS:
            raise Refusal(
                "its vectors are a torch.nn.ParameterDict, as the first code of textual inversion saved them, a module "
                "that is not loaded here: where you trust the file, load it, and save {token: vectors} by safetensors"
            )
        raise Refusal(
            f"it is a pickle with code in it (it asks for {name.replace(' ', '.')!r}), which was not run: ask for a "
            "safetensors file, or have whoever made it save tensors alone"
        )
    return _Global(name)


def _storage(identity: object, claim: Callable[[str, int], None]) -> _Storage:
    kind, of, key, _, count, *view = identity
    itemsize = _STORAGES[of.name]
    if kind != "storage" or not isinstance(count, int) or count < 0 or any(view):
        raise Refusal(f"it names a storage in a way that PyTorch does not: {kind!r} of {count!r}")
    claim(str(key), count * itemsize)
    return _Storage(count * itemsize, itemsize)


def _called(function: object, arguments: object) -> object:
    """What a call gives; each that is known costs no more than its own length."""
    if function == _Global(_ORDERED) and arguments == ():
        return _CONTAINER
    if function == _Global(_PARAMETER) and isinstance(arguments[0], _Storage):
        return arguments[0]
    if function == _Global(_TENSOR) and isinstance(arguments[0], _Storage):
        storage, _, shape = arguments[:3]
        nbytes = math.prod(shape) * storage.itemsize
        if nbytes > storage.nbytes:
            raise Refusal(f"a tensor claims {nbytes} bytes of a storage of {storage.nbytes}")
        return storage
    raise Refusal("it makes a call that PyTorch does not write for tensors; nothing was run")
