"""All models of the zoo that are written here, in one list."""

from __future__ import annotations

from tests.zoo.bagged import BAGGED
from tests.zoo.columnwise import COLUMNWISE
from tests.zoo.crosses import CROSSES
from tests.zoo.dot import DOT
from tests.zoo.entry import Entry
from tests.zoo.hard import HARD
from tests.zoo.sequence import SEQUENCE

ZOO: tuple[Entry, ...] = (*DOT, *BAGGED, *COLUMNWISE, *CROSSES, *SEQUENCE, *HARD)
