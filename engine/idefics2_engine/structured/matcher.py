"""How far one answer has satisfied its constraint."""

from typing import TYPE_CHECKING

from idefics2_engine.errors import StructuredOutputError

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Matcher:
    """The state of one answer, which only known tokens advance, so nothing is ever undone.

    Where the constraint leaves one text alone to go on, its tokens are forced. They are the same
    whether they are appended at once or drawn one by one.

    Args:
        state: The matcher of llguidance, which is advanced.
    """

    def __init__(self, state: "LLMatcher") -> None:
        self.state = state
        # Tokens of the last text that was the only one, which were not consumed yet
        self._forced: list[int] = []

    def consume(self, token_id: int) -> None:
        """Advance by a token that is no end token.

        Raises:
            StructuredOutputError: The token is not allowed, or a limit of llguidance is exceeded.
        """
        self._forced = self._forced[1:]
        if not self.state.consume_token(token_id):
            self.check()
        if not (self._forced or self.state.is_stopped()):
            self._forced = self.state.compute_ff_tokens()
        self.check()

    @property
    def forced(self) -> list[int]:
        """The next tokens, where there is one possible text alone."""
        return self._forced

    @property
    def is_complete(self) -> bool:
        """Whether the answer satisfies the constraint, and no longer text does."""
        return self.state.is_stopped() and self.state.is_accepting()

    @property
    def may_end(self) -> bool:
        """Whether the answer satisfies the constraint."""
        return self.state.is_accepting()

    def check(self) -> None:
        """Raise ``StructuredOutputError`` if the matcher has failed."""
        if self.state.is_error():
            raise StructuredOutputError(
                f"structured_outputs must be followed, got {self.state.get_error():.300}"
            )
