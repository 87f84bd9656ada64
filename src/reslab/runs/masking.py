"""Keep keys and tokens out of the files of a run."""

import itertools
import json
import os
import re
import shlex
from collections.abc import Sequence

MASK = "***"
_NAME = r"[\w.-]*(?:key|token|secret|password|credential)[\w-]*"
_FLAG = re.compile(rf"(?i)--?{_NAME}")  # its value is the next word,
_WORD = re.compile(rf"(?is)\A((?:--?)?{_NAME}\+?=).*")  # or the rest of this word,
_INSIDE = re.compile(rf"(?i)({_NAME}[\"']?\s*[:=]\s*)(?:\"[^\"]*\"|'[^']*'|[^\s,&}}\]]+)")  # or inside YAML or a URL
_LOGIN = re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)")
_VARIABLE = re.compile(r"(?i)(?:key|token|secret|password)$")
_FILE = re.compile(
    r"(?ix) (?:^|/) (?: \.env(?:\.[^/]*)? | [._]netrc | id_(?:rsa|ecdsa|ed25519) | [^/]*\.(?:pem|key)"
    r" | [^/]*(?<![a-z])(?:secrets?|credentials?|passwords?|api[_-]?key|tokens?)(?:\.(?:txt|json|ya?ml|toml|ini))?) $"
)
_SHORTEST = 8  # characters: shorter values are not keys, and occur in ordinary words


def mask(text: str) -> str:
    """Mask the values of secret environment variables, such as WANDB_API_KEY, in a text."""
    values = [value for name, value in os.environ.items() if _VARIABLE.search(name) and len(value) >= _SHORTEST]
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, MASK).replace(json.dumps(value)[1:-1], MASK)
    return text


def mask_command(words: Sequence[str]) -> str:
    """Join a command line for a shell, with secrets masked: by option name, or by their value in the environment."""
    masked = []
    for previous, word in itertools.pairwise(["", *words]):
        if _FLAG.fullmatch(previous) and not word.startswith("--"):
            word = MASK
        for pattern in (_WORD, _INSIDE, _LOGIN):
            word = pattern.sub(rf"\1{MASK}", word)
        masked.append(mask(word))
    return shlex.join(masked)


def is_secret(name: str) -> bool:
    """Whether an option with this name holds a key or password: api_key, token."""
    return _FLAG.fullmatch(f"--{name}") is not None


def keeps_secrets(name: str) -> bool:
    """Whether a file with this name usually holds keys or passwords: .env, .netrc, *.pem, api_key.txt."""
    return _FILE.search(name) is not None
