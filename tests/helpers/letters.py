"""A detokenizer for tests of what is host only."""


class Letters:
    """Every token is one letter."""

    def add(self, token_id: int) -> str:
        return chr(ord("a") + token_id % 26)

    def flush(self) -> str:
        return ""
