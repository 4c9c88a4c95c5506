"""When waiting sequences join the running ones: numbers of a policy, as a pure function of counts.

A step that computes prompts costs more than one that only decodes, whatever it computes: it is
launched in more parts and padded to a larger size. If one answer ends and one begins in every step,
all steps are of this kind. While many sequences run, those that wait are therefore held back until
several can join in one step. Slots stay empty meanwhile, so the wait is short and bounded.
``tests/tools/simulate_admission.py`` simulates a job with other numbers.
"""

from dataclasses import dataclass
from typing import Self

# One sequence in so many slots joins at a time
_SLOTS_PER_ENTRANT = 32
# Sequences are held back for at most so many steps
_MAX_HELD = 8
# A longer answer may be preferred to a waiting sequence for so many admissions a slot
_PATIENCE = 2


@dataclass(frozen=True)
class AdmissionPolicy:
    """Bounds on holding back and overtaking.

    Attributes:
        enough: Sequences that are worth a step of their own.
        max_held: Most steps for which sequences are held back.
        busy: With fewer running sequences, none is held back.
        patience: A sequence that may be overtaken is admitted next after so many admissions since
            it began to wait.
    """

    enough: int = 1
    max_held: int = 0
    busy: int = 0
    patience: int = 0

    @classmethod
    def for_slots(cls, max_num_seqs: int) -> Self:
        """Return the policy for at most ``max_num_seqs`` running sequences."""
        return cls(
            enough=max(1, max_num_seqs // _SLOTS_PER_ENTRANT),
            max_held=_MAX_HELD,
            busy=max_num_seqs // 2,
            patience=_PATIENCE * max_num_seqs,
        )

    def admits(self, *, running: int, ready: int, held: int, is_urgent: bool) -> bool:
        """Return whether waiting sequences join in this step.

        Args:
            running: Running sequences.
            ready: Waiting sequences for which there is a slot.
            held: Steps since the first of them could have joined.
            is_urgent: Whether a caller waits for every token of one, or the step computes a prompt
                anyway.
        """
        return is_urgent or running < self.busy or ready >= self.enough or held >= self.max_held


AT_ONCE = AdmissionPolicy()
"""The policy that holds back and prefers no sequence."""
