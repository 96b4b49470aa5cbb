from ssync_pl.compare.curves import complete_curve, join_curves, read_curve, set_curve_aside, write_curve


def rows(*steps, tag="a"):
    return [{"step": str(step), "loss": f"{tag}{step}"} for step in steps]


def test_what_was_done_twice_comes_from_the_later_run():
    joined = join_curves(rows(0, 1, 2, 3), rows(2, 3, 4, tag="b"))
    assert joined == [*rows(0, 1), *rows(2, 3, 4, tag="b")]
    assert join_curves(rows(0, 1), []) == rows(0, 1)


def test_a_curve_survives_several_kills(tmp_path):
    write_curve(tmp_path / "metrics.csv", rows(0, 1, 2, 3))
    set_curve_aside(tmp_path)
    set_curve_aside(tmp_path)  # killed before the logger wrote anything
    assert not (tmp_path / "metrics.csv").exists()
    write_curve(tmp_path / "metrics.csv", [*rows(2, 3, tag="b"), {"step": "3", "val/x": "1"}])
    set_curve_aside(tmp_path)
    write_curve(tmp_path / "metrics.csv", rows(4, tag="c"))
    complete_curve(tmp_path)
    complete_curve(tmp_path)
    expected = [*rows(0, 1), *rows(2, 3, tag="b"), {"step": "3", "val/x": "1"}, *rows(4, tag="c")]
    assert read_curve(tmp_path / "metrics.csv") == expected
    assert not (tmp_path / "metrics_before.csv").exists()


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,loss,step\n0,0.5,1\n0,0.4")
    assert read_curve(tmp_path / "metrics.csv") == [{"epoch": "0", "loss": "0.5", "step": "1"}]
