"""Any sequence of starts, kills, damage and changes keeps rows, order, and files of the user."""

from job_machine import MACHINE_SETTINGS, JobMachine

test_state_machine = JobMachine.TestCase
test_state_machine.settings = MACHINE_SETTINGS
