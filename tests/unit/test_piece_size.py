"""A piece of a job has as many rows as the machine adds in the time for which others may wait."""

from __future__ import annotations

from coupon_svc.postgres.jobs import PIECE_ROWS
from coupon_svc.service.jobs import PIECE_ROWS_MIN, PIECE_S, PieceSize


def test_pieces_are_as_large_as_they_are_quick() -> None:
    for row_s, rows in ((PIECE_S / PIECE_ROWS / 2, PIECE_ROWS), (PIECE_S / 700, 700)):
        piece = PieceSize()
        sizes = []
        for _ in range(50):
            piece.note(piece.rows * row_s)
            sizes.append(piece.rows)
        assert max(sizes) <= PIECE_ROWS
        assert min(sizes[10:]) >= max(rows / 2, PIECE_ROWS_MIN)
        assert max(sizes[10:]) <= rows * 9 / 8


def test_a_machine_that_stalls_still_adds_some_and_then_as_many_as_before() -> None:
    piece = PieceSize()
    for _ in range(10):
        piece.note(60.0)
    assert piece.rows == PIECE_ROWS_MIN
    for _ in range(10):
        piece.note(0.001)
    assert piece.rows == PIECE_ROWS
