from holdfast.checks.core import resume


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    case = resume.CASES["dropout, accumulation, adamw4"]
    outcome = resume.interrupt(case, tmp_path / "case", kills=3, in_write=1, seed=0)
    assert outcome.kills == 3 and outcome.in_write >= 1
    assert outcome.different == []
