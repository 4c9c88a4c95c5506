"""Questions about the demo's images, as conversations."""

import json
from typing import Any

from idefics2_engine.demo import DEMO_IMAGES


def first_questions() -> list[list[dict[str, Any]]]:
    """Return a conversation for each entry of ``questions.json``: its images and first question."""
    return [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": str(DEMO_IMAGES / i)} for i in entry["images"]),
                    {"type": "text", "text": entry["turns"][0][0]},
                ],
            }
        ]
        for entry in json.loads((DEMO_IMAGES / "questions.json").read_text())
    ]
