"""The main job: what fits in a budget, exactly, before anything is allocated."""
