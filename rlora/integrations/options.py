"""From the words of a config file to an optimizer class and its options."""

import ast
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch.optim import Optimizer

import rlora.torch


def optimizer_names() -> list[str]:
    """Names of the optimizer classes of `rlora.torch`.

    Returns
    -------
    list of str
        As `optimizer_named` takes them.
    """
    named = [(name, getattr(rlora.torch, name)) for name in rlora.torch.__all__]
    return [name for name, x in named if isinstance(x, type) and issubclass(x, Optimizer)]


def optimizer_named(name: str) -> Callable[..., Optimizer]:
    """The optimizer class of a name.

    Parameters
    ----------
    name : str
        One of `optimizer_names`.

    Returns
    -------
    type
        The class.

    Raises
    ------
    ValueError
        When there is none of this name; it says which there are.
    """
    names = optimizer_names()
    if name not in names:
        msg = f"rlora has no optimizer {name!r}; it has {', '.join(names)}"
        raise ValueError(msg)
    kind: Callable[..., Optimizer] = getattr(rlora.torch, name)
    return kind


def finds_rate(kind: Callable[..., Optimizer]) -> bool:
    """Tell whether a class finds its learning rate, so that ``lr`` multiplies it.

    Parameters
    ----------
    kind : type
        From `optimizer_named`.

    Returns
    -------
    bool
    """
    return bool(getattr(kind, "finds_rate", False))


def check_multiplier(kind: Callable[..., Optimizer], lr: float) -> None:
    """Refuse a trainer's learning rate that would multiply the one that a class finds.

    Parameters
    ----------
    kind : type
        From `optimizer_named`.
    lr : float
        The trainer's.

    Raises
    ------
    ValueError
        When the class finds its rate, and `lr` is not 1.
    """
    if finds_rate(kind) and lr != 1.0:
        msg = (
            f"{getattr(kind, '__name__', kind)} finds its learning rate, and the trainer's "
            f"multiplies it: expected learning_rate 1, got {lr!r}"
        )
        raise ValueError(msg)


def from_text(text: str | None) -> dict[str, Any]:
    """Options written as in a call: ``damping=1e-3, betas=(0.7, 0.8), placement=both``.

    Parameters
    ----------
    text : str, optional
        None and blanks stand for no options.

    Returns
    -------
    dict
        Values by name, each as `from_word` reads it.

    Raises
    ------
    ValueError
        When the text is something else, or has a name twice.
    """
    source = f"options({text or ''})"
    try:
        call = ast.parse(source, mode="eval").body
    except SyntaxError:
        call = None
    match call:
        case ast.Call(func=ast.Name(), args=[], keywords=words):
            pass
        case _:
            words = []
    if text and text.strip() and not (words and all(word.arg for word in words)):
        msg = f"options must be name=value, separated by commas, got {text!r}"
        raise ValueError(msg)
    names = [word.arg for word in words]
    if doubled := [name for name in names if names.count(name) > 1]:
        msg = f"each option may be given once, got {doubled[0]!r} {names.count(doubled[0])} times"
        raise ValueError(msg)
    return {str(word.arg): from_word(ast.get_source_segment(source, word.value)) for word in words}


WORDS: Final = {"true": True, "false": False, "none": None, "null": None}
"""Values that config files and command lines spell in their own ways."""


def from_word(value: Any) -> Any:
    """An option that may have come as text: "1e-3" is a number, "both" a word; lists as tuples.

    "true", "false", "none" and "null" are values in any case of letters.

    Parameters
    ----------
    value : object
        As a config file or a command line gave it.

    Returns
    -------
    object
        As the optimizer takes it.
    """
    if isinstance(value, str):
        if value.strip().lower() in WORDS:
            return WORDS[value.strip().lower()]
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            return value
    return tuple(value) if isinstance(value, list) else value


def from_mapping(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a mapping that a config file gave.

    Parameters
    ----------
    options : dict
        Values by name, which may be text.

    Returns
    -------
    dict
        Each value as `from_word` reads it.
    """
    return {name: from_word(value) for name, value in options.items()}
