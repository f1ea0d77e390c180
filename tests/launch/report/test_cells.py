"""The records of a table."""

from evmamba.launch.report.cells import Cell, Group


def test_a_cell_counts_its_seeds_and_shows_its_difference():
    assert Cell("81.3 ± 0.4 (3)", "measured", 81.3, 0.4, [81.1, 81.3, 81.5]).count == 3
    assert Cell("76.5", "published", 76.5, difference="+1.2").full_text == "76.5 (+1.2)"
    assert Cell("76.5", "published", 76.5).full_text == "76.5"


def test_a_group_knows_the_papers_schedules():
    assert dict(Group("detection", "maskrcnn", "", []).schedules) == {"1x": 12, "3x": 36}
    assert dict(Group("cost", None, "", []).schedules) == {}
