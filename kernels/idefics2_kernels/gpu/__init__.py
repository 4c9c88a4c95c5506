"""What every kernel needs: facts about the GPU, argument checks, dependent launch, tile counters.

Must not import any kernel.
"""
