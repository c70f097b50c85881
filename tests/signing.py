"""What a stranger can do who changes an adapter's weights on purpose: write the digest of provenance.json anew."""

import json
from pathlib import Path

from loramox.files import sha256_of


def sign(adapter: Path) -> None:
    """Let provenance.json, where there is one, know the weights as they are now."""
    path = adapter / "provenance.json"
    if path.exists():
        digest = sha256_of(adapter / "adapter_model.safetensors")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": digest}))
