"""A detokenizer for tests that run on the host alone."""


class Letters:
    """A detokenizer for which every token is one letter."""

    def add(self, token_id: int) -> str:
        return chr(ord("a") + token_id % 26)

    def add_all(self, token_ids: list[int]) -> str:
        return "".join(map(self.add, token_ids))

    def flush(self) -> str:
        return ""
