import io

import numpy as np
import pytest
from PIL import Image

from ssync_pl.errors import ShapeError
from ssync_pl.tools.viz import SheetRow, draw_sheet, encode_png, stack_sheets


def solid(color: tuple[int, int, int], frames: int = 2, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    return np.broadcast_to(np.array(color, dtype=np.uint8), (frames, *size, 3))


def boxes_of(sheet: np.ndarray, color: tuple[int, int, int]) -> tuple[list[int], list[int]]:
    rows, columns = np.nonzero((sheet == np.array(color)).all(axis=-1))
    return sorted(set(rows.tolist())), sorted(set(columns.tolist()))


def test_cells_are_aligned_and_do_not_overlap() -> None:
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    rows = [SheetRow(f"row {k}", solid(color)) for k, color in enumerate(colors)]
    sheet = draw_sheet(rows, title="title", columns=["a", "b"], cell=20)
    places = [boxes_of(sheet, color) for color in colors]
    for row_places, column_places in places:
        assert len(row_places) == 20
        assert len(column_places) == 40
        assert column_places == places[0][1]
    assert max(places[0][0]) < min(places[1][0])
    assert max(places[1][0]) < min(places[2][0])


def test_captions_stay_left_of_the_cells() -> None:
    caption = "a rather long caption\nin two lines"
    sheet = draw_sheet([SheetRow(caption, solid((200, 0, 0)), (("legend word", (1, 2, 3)),))], cell=64)
    rows, columns = boxes_of(sheet, (200, 0, 0))
    assert len(rows) == 64
    margin = sheet[:, columns[0] - 4 : columns[0]]
    assert (margin == 255).all()
    assert (sheet[:, : columns[0]] < 128).any()


def test_a_tall_legend_makes_its_row_taller() -> None:
    legend = tuple((f"word {k}", (k, 0, 0)) for k in range(6))
    sheet = draw_sheet([SheetRow("x", solid((200, 0, 0)), legend), SheetRow("y", solid((0, 200, 0)))], cell=16)
    assert max(boxes_of(sheet, (200, 0, 0))[0]) < min(boxes_of(sheet, (0, 200, 0))[0])
    assert sheet.shape[0] > 6 * 14


def test_wide_frames_keep_their_shape_and_large_ones_shrink() -> None:
    sheet = draw_sheet([SheetRow("x", solid((200, 0, 0), 1, (30, 60)))], cell=20)
    rows, columns = boxes_of(sheet, (200, 0, 0))
    assert (len(rows), len(columns)) == (10, 20)


def test_a_title_wider_than_the_cells_fits() -> None:
    narrow = draw_sheet([SheetRow("x", solid((200, 0, 0), 1))], cell=8)
    wide = draw_sheet([SheetRow("x", solid((200, 0, 0), 1))], title="a title of many words " * 4, cell=8)
    assert wide.shape[1] > narrow.shape[1]
    assert (wide[:, -10:] == 255).all()


def test_errors_name_the_row() -> None:
    with pytest.raises(ShapeError, match="at least one row"):
        draw_sheet([])
    with pytest.raises(ShapeError, match="'short'"):
        draw_sheet([SheetRow("x", solid((0, 0, 0), 2)), SheetRow("short", solid((0, 0, 0), 1))])
    with pytest.raises(ShapeError, match="2 captions"):
        draw_sheet([SheetRow("x", solid((0, 0, 0), 2))], columns=["a"])


def test_stack_and_png_round_trip() -> None:
    stacked = stack_sheets([solid((9, 9, 9), 1, (2, 3))[0], solid((7, 7, 7), 1, (1, 5))[0]])
    assert stacked.shape == (3, 5, 3)
    assert (stacked[:2, 3:] == 255).all()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(stacked)))), stacked)
    with pytest.raises(ShapeError, match="at least one sheet"):
        stack_sheets([])
