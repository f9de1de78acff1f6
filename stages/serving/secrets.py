"""What results may show of a server's settings: keys are left out."""

from __future__ import annotations

import os
import re

from stages.settings import as_dict
from stages.settings.schema import ServingSettings

KEY = "MXFORGE_API_KEY"  # environment variable: an endpoint's
SECRET_NAME = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)(?:_|$)", re.I)
SECRET_VALUE = re.compile(r"://[^/\s]*@|^(?:sk-|hf_|gh[a-z]_|Bearer )|^(?=.*\d)(?=.*[A-Za-z])[\w+=-]{32,}$", re.A)
LEFT_OUT = "(left out)"


def without_key(text: str) -> str:
    """What a server said, without the API key, which some repeat."""
    key = os.environ.get(KEY, "").strip()
    return text.replace(key, f"[{KEY}]") if key else text


def without_secrets(variables: dict[str, str]) -> dict[str, str]:
    """Environment variables as results may show them: what is named or looks like a key is left out."""
    return {name: LEFT_OUT if SECRET_NAME.search(name) or SECRET_VALUE.search(value) else value for name, value in sorted(variables.items())}


def without_api_key(words: list[str]) -> list[str]:
    """Words of a `vllm serve` command as results may show them: without what follows --api-key."""
    shown, left_out = [], False
    for word in words:
        flag, equals, _ = word.replace("_", "-").partition("=")
        left_out = left_out and not word.startswith("--")  # several keys may follow
        shown.append(LEFT_OUT if left_out else f"{flag}={LEFT_OUT}" if flag == "--api-key" and equals else word)
        left_out = left_out or (flag == "--api-key" and not equals)
    return shown


def settings_shown(serving: ServingSettings) -> dict:
    """The settings of a measurement as serving.json has them."""
    return as_dict(serving) | {"flags": without_api_key(serving.flags), "variables": without_secrets(serving.variables)}
