"""The search for the operations of A that explain why two paths differ."""
