"""What a failed capture says: the cause, the line of the model, and the advice that Dynamo gives."""

from __future__ import annotations

import re

#: A part of a message (cause, explanation, advice) is cut after this many characters.
_LONGEST = 300
#: Where hooks move weights while the model runs, and what to do about it.
_MOVED = {
    "/accelerate/hooks.py": "accelerate moves the weights of each layer to the device when it runs (offload), which a "
    "graph cannot do; load the model with all its weights on one device",
    "/fsdp/_fully_shard/": "FSDP gathers the weights of single layers while the model runs, which a graph cannot do "
    "with gradients, or where it changes types (a MixedPrecisionPolicy); call the model under torch.no_grad(), or "
    "shard it as a whole: fully_shard(model), and optimize(..., inplace=True)",
}
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def explain_failure(error: BaseException) -> str:
    """One line: type, cause, ``[file:line]``, explanation and first advice, each where the error has it.

    Dynamo's messages hold all of these in paragraphs, beside the stacks of its own files.
    """
    text = str(error)
    head = text.split("\n\n")[0].strip().splitlines() or [""]
    cause = []
    for line in head:
        if line.strip().startswith(("Explanation:", "Hint:", "Developer debug context:", "User Stack")):
            break
        cause.append(line.split(" (unhinted:")[0].strip())
    parts = [f"{type(error).__name__}: {_short(' '.join(cause))}"]
    place = _place(text)
    if place:
        parts[0] += f" [{place}]"
    advice = next((text for file, text in _MOVED.items() if file in place), None)
    for label in () if advice else ("Explanation", "Hint"):
        found = re.search(
            rf"^ *{label}: *(.+(?:\n(?! *(?:Explanation|Hint|Developer debug context):| *$).+)*)", text, re.MULTILINE
        )
        if found:
            parts.append(f"{label.lower()}: {_short(' '.join(found.group(1).split()))}")
    parts += [advice] if advice else []
    return "; ".join(parts)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST].rsplit(" ", 1)[0] + " ..."


def _place(text: str) -> str:
    """``file:line`` of the innermost frame of the user's code ("" where the message has none)."""
    for title in ("from user code:", "User Stack (most recent call last):"):
        _, found, stack = text.rpartition(title)
        frames = _FRAME.findall(stack) if found else []
        if frames:
            return ":".join(frames[-1])
    return ""
