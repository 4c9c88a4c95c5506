"""How far two implementations of the operations agree on the successors of the same tokens."""
