"""English by rules, and the same judgements by a language model where one is given."""
