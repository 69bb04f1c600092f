"""What a statement does, told by its text alone: only reads, is bound to its connection, names session variables, or
says nothing that we know.

Nothing here is trusted to be more than a shortcut. A statement that is taken for a read is one whose every word is
known to be harmless; all that is not understood counts as a write, and as one that may have changed the session.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_READERS = frozenset({"select", "with", "values", "table", "show", "explain"})

#: Words that only what writes, locks or runs something else has. Quoted names are taken out before.
_WRITERS = _words(
    """
    insert update delete merge replace upsert truncate create alter drop into call do execute lock share copy
    grant revoke refresh reindex vacuum cluster analyze import load set reset discard declare fetch move
    listen notify unlisten attach detach pragma prepare deallocate comment use handler flush kill outfile
    dumpfile next
    """
)

#: What may stand before a parenthesis in a read: SQL's own words and types, and functions without side effects.
_HARMLESS = _words(
    """
    select from where and or not in as on exists any all some values over filter when then else case by having using
    union intersect except distinct limit offset interval cast extract array row lateral collate partition within
    group order end between like ilike is null join cross recursive materialized only rows range with escape
    varchar char character numeric decimal float double precision bit varbit time timestamp timestamptz integer
    bigint smallint text date boolean uuid json jsonb signed unsigned binary datetime convert
    count sum avg min max stddev stddev_pop stddev_samp variance var_pop var_samp std bool_and bool_or every
    array_agg string_agg group_concat json_agg jsonb_agg json_object_agg jsonb_object_agg json_arrayagg bit_and
    bit_or bit_xor corr covar_pop covar_samp regr_avgx regr_avgy regr_count regr_intercept regr_r2 regr_slope
    regr_sxx regr_sxy regr_syy any_value mode percentile_cont percentile_disc row_number rank dense_rank
    percent_rank cume_dist ntile lag lead first_value last_value nth_value
    lower upper length char_length character_length octet_length bit_length concat concat_ws substr substring left
    right trim ltrim rtrim btrim lpad rpad repeat reverse strpos instr position locate overlay initcap ascii chr md5
    sha1 sha2 sha224 sha256 sha384 sha512 digest encode decode hex unhex to_hex translate split_part regexp_replace
    regexp_matches regexp_match regexp_substr starts_with quote quote_literal quote_ident format to_char to_date
    to_number to_timestamp unaccent similarity word_similarity strict_word_similarity levenshtein soundex metaphone
    to_tsvector to_tsquery plainto_tsquery phraseto_tsquery websearch_to_tsquery ts_rank ts_rank_cd ts_headline
    setweight tsvector strip glob match
    abs ceil ceiling floor round trunc  mod power pow sqrt exp ln log log2 log10 sign sin cos tan cot
    asin acos atan atan2 degrees radians pi random rand div greatest least crc32
    coalesce nullif ifnull if iif nvl typeof pg_typeof to_json to_jsonb
    now current_timestamp current_date current_time localtime localtimestamp statement_timestamp
    transaction_timestamp clock_timestamp date_trunc date_part date_format date_add date_sub datediff timestampdiff
    timestampadd time_format str_to_date strftime julianday unixepoch year month day hour minute second week weekday
    dayofweek dayofyear dayofmonth quarter last_day make_date make_interval age timezone utc_timestamp sysdate
    curdate curtime from_unixtime unix_timestamp convert_tz timediff maketime makedate yearweek microsecond
    isfinite justify_days justify_hours justify_interval
    json_extract json_type json_array json_object json_valid json_quote json_unquote json_keys json_length
    json_contains json_contains_path json_overlaps json_value json_query json_each json_tree json_array_length
    json_build_object jsonb_build_object json_build_array jsonb_build_array jsonb_array_length jsonb_extract_path
    jsonb_path_exists jsonb_path_query jsonb_set jsonb_array_elements jsonb_array_elements_text json_array_elements
    jsonb_each jsonb_object_keys jsonb_typeof json_typeof row_to_json unnest array_length array_position
    array_to_string array_append array_cat array_remove cardinality generate_series isempty lower_inc upper_inc
    lower_inf upper_inf
    version current_setting current_schema current_schemas current_user session_user database schema user
    connection_id gen_random_uuid uuid_generate_v4 uuid pg_sleep sleep bin_to_uuid
    uuid_to_bin inet_aton inet_ntoa sqlite_version pg_current_xact_id_if_assigned
    to_regclass
    bitxor any_value uuidv4 uuidv7 uuid_v4 uuid_v7
    django_date_extract django_date_trunc django_datetime_cast_date django_datetime_cast_time django_datetime_extract
    django_datetime_trunc django_format_dtdelta django_time_diff django_time_extract django_time_trunc
    django_timestamp_diff
    """
)

#: Comments and what is quoted, as far as the databases agree on where they end. Not so: ``--`` without a blank, which
#: is an operator of MySQL's; comments within comments; comments that MySQL and MariaDB execute.
_NOISE = re.compile(
    r"--(?=[ \t\n]|\Z)[^\n]*|/\*(?![mM]?!)(?:(?!/\*).)*?\*/|'(?:[^'\\]|'')*'|\"(?:[^\"]|\"\")*\"|`(?:[^`]|``)*`",
    re.DOTALL,
)
#: Where the text could hide words from what follows: backslashes, dollar quotes, a comment of MySQL's that ends while
#: the text goes on, a name of SQLite's in brackets, a line that ends for one database and not for another.
_HIDING = re.compile(r"\\|\$\w*\$|#[^\n]*\n|\[[^\]]*['\"`]|\r")
_MARKS = re.compile(r"['\"`;]|/\*|\*/|--|:=|@(?![>@])(?<!<@)(?<!@@)")
_WORD = re.compile(r"[A-Za-z_][\w$]*")
_CALL = re.compile(r"([A-Za-z_][\w$]*)\s*\(")
_QUALIFIED_CALL = re.compile(r"\.\s*[A-Za-z_][\w$]*\s*\(")
#: The columns of a CTE, which look as a call of it would.
_COLUMNS = re.compile(
    r"(?i)(\bwith|\brecursive|,)(\s*\w+)\s*\([\w\s,]*\)(\s*as\s*(?:(?:not\s+)?materialized\s*)?\(\s*(?:select|with|values)\b)"
)


#: Functions of PostGIS, MariaDB and MySQL for geometries: none does more than compute.
_SPATIAL = ("st_", "postgis_")


@lru_cache(maxsize=2048)
def only_reads(sql: str, harmless: frozenset[str] = frozenset()) -> bool:
    """Tell whether a statement provably does nothing but read: True is a proof, False is a doubt.

    ``harmless`` are functions that are taken to be so too, lower case.
    """
    bare = _bare(sql)
    if bare is None:
        return False
    for name in harmless:
        bare = re.sub(rf"(?i)(?<![\w$.]){re.escape(name)}(?=\s*\()", "abs", bare)
    words = [word.lower() for word in _WORD.findall(bare)]
    if not words or (words[0] not in _READERS and not bare.startswith("(")):
        return False
    calls = {call.lower() for call in _CALL.findall(_COLUMNS.sub(r"\1\2\3", bare))}
    # REPLACE() is a function too, TRUNCATE() and INSERT() on MariaDB.
    functions = {"replace", "truncate", "insert"} - {words[0]}
    if _WRITERS.intersection(words) - (calls & functions) or _QUALIFIED_CALL.search(bare):
        return False
    return all(call.startswith(_SPATIAL) for call in calls - _HARMLESS - functions)


def _bare(sql: str) -> str | None:
    """Return a statement without its comments, and a Q for what is quoted; None where these cannot be told."""
    sql = sql.replace("ESCAPE '\\'", "")  # Django's, with LIKE on SQLite
    if _HIDING.search(sql):
        return None
    bare = _NOISE.sub(lambda found: " Q " if found.group()[0] in "'\"`" else " ", sql).strip().rstrip("; \n\t")
    return bare if bare.isascii() and not _MARKS.search(bare) else None


# --- What is bound to the connection that it is said on -------------------------------


class Bond(Enum):
    """What keeps a read on the connection of its caller."""

    #: Rows are locked, for the transaction of that connection.
    LOCK = "select_for_update"
    #: It may do more than read, or its answer is about the connection.
    OWN = "writes"
    #: It tells when its transaction began, which is another moment for another connection.
    CLOCK = "transaction"


#: Functions that change a session, or answer for it: locks, sequences, what was inserted or found last, who and where
#: one is, what is sent to other sessions and servers.
_OWN = re.compile(
    r"""(?ix) (?<![a-z0-9_$])
    (?: \w*advisory\w* | dblink\w* | lo_\w+ | \w*get_lock | release_\w*locks? | is_(?:free|used)_lock
      | set_config | setseed | setval | nextval | currval | lastval | last_insert_id | last_insert_rowid
      | found_rows | row_count | changes | total_changes | txid_\w+ | pg_current_xact_id\w*
      | pg_(?:current_)?snapshot\w* | pg_export_snapshot | pg_backend_pid | pg_my_temp_schema | pg_is_other_temp_schema
      | pg_notify | pg_listening_channels | pg_cancel_backend | pg_terminate_backend | pg_reload_conf | pg_switch_wal
      | connection_id | ps_current_thread_id | inet_client_\w+ | load_extension | query_to_xml\w* | cursor_to_xml\w*
    ) (?![a-z0-9_$]) | (?<![<@])@@?[a-z_]"""
)
#: Of these, the ones that :func:`only_reads` takes for reads, as they are; and variables of MySQL's sessions.
_OWN_READ = re.compile(r"(?i)\bconnection_id\s*\(|@@[a-z_]")
#: Views of a session, quoted or not.
_OWN_VIEW = re.compile(
    r"(?i)\b(?:pg_(?:cursors|prepared_statements|settings|stat_xact_\w+)|session_(?:variables|status)|sqlite_temp_\w+)\b"
)
_CLOCK = re.compile(
    r"""(?ix) (?<![a-z0-9_$.]) (?: (?: now | age | transaction_timestamp ) \s* \(
      | (?: transaction_timestamp | current_timestamp | current_date | current_time | localtime
          | localtimestamp ) \b )"""
)
_CLOCK_LITERAL = re.compile(r"(?i)'\s*(?:now|today|tomorrow|yesterday)\b")


@lru_cache(maxsize=2048)
def bond_of(sql: str, harmless: frozenset[str] = frozenset()) -> Bond | None:
    """Tell what keeps a statement from being said on another connection than its caller's; None: nothing."""
    if not only_reads(sql, harmless):
        return Bond.OWN
    bare = _bare(sql) or ""
    if _OWN_READ.search(bare) or _OWN_VIEW.search(sql):
        return Bond.OWN
    return Bond.CLOCK if _CLOCK.search(bare) or _CLOCK_LITERAL.search(sql) else None


@lru_cache(maxsize=2048)
def functions_in_doubt(sql: str, harmless: frozenset[str] = frozenset()) -> frozenset[str]:
    """Return the functions, lower case, of which alone it depends whether a statement only reads; none where there is
    more in doubt, or nothing.
    """
    bare = _bare(sql)
    if bare is None:
        return frozenset()
    names = _unknown(_NAME_OF_CALL.findall(_COLUMNS.sub(r"\1\2\3", bare))) - harmless
    if any(_OWN.search(name) for name in names) or not only_reads(sql, harmless | names):
        return frozenset()
    return names


def _unknown(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.lower() for name in names) - _HARMLESS - _WRITERS


def bond_of_function(text: str) -> tuple[Bond | None, frozenset[str]]:
    """Tell what a function of somebody's own, told by its name or its template, is bound by; and which it calls, lower
    case, that are not known to be harmless.
    """
    if _OWN.search(text):
        return Bond.OWN, frozenset()
    return Bond.CLOCK if _CLOCK.search(text) else None, _unknown(_NAME_OF_CALL.findall(text))


_NAME_OF_CALL = re.compile(r"(?<![\w$.])[A-Za-z_][\w$]*(?:\.[A-Za-z_][\w$]*)*(?=\s*\()")


# --- What a statement leaves behind in its session ----------------------------------


@dataclass(frozen=True, slots=True)
class Trace:
    """What a statement may have changed of its session, and whether its first word says that it writes."""

    #: Variables that it sets, lower case.
    names: frozenset[str] = frozenset()
    #: It may have changed what has no name, or a name that cannot be told.
    unknown: bool = False
    #: It is no read and no SET: rows, tables or locks are other than before.
    writes: bool = False
    savepoint: bool = False
    #: It begins or ends a transaction of which Django knows nothing.
    begins: bool = False
    ends: bool = False
    #: It calls set_config() with a name that is a parameter.
    names_in_params: bool = False
    #: What it sets is over with the transaction.
    local: bool = False
    #: It says how its transaction is to be isolated, and must come before all queries of that.
    level: bool = False


NO_TRACE = Trace()
UNKNOWN = Trace(unknown=True, writes=True)
_WRITES = Trace(writes=True)
_SAVEPOINT = Trace(savepoint=True)
_LEVEL = Trace(level=True)
_BEGINS = Trace(begins=True)
_ENDS = Trace(ends=True)

#: What begins with these changes rows or tables: nothing of the session.
_WRITING = _words(
    """
    insert update delete merge replace truncate vacuum analyze alter drop create comment grant revoke refresh
    reindex cluster optimize checkpoint notify copy
    """
)
_NEUTRAL = _words(
    """
    explain show values table describe desc close fetch move
    """
)
_SET = re.compile(
    r"""(?ix)\s* (?:set\s+(?:(?P<scope>session|local)\s+)?|reset\s+)
    (?: (?P<zone>time\s+zone)\b | (?P<role>role)\b | (?P<who>session\s+authorization)\b
      | (?P<name>"?[a-z_][\w$]*"?(?:\."?[a-z_][\w$]*"?)*) \s* (?:=|\bto\b|;|$) )"""
)
_SET_CONFIG = re.compile(r"(?i)\bset_config\s*\(\s*(?:'([^'\\]*)'\s*,|(%(?:\(\w+\))?s)\s*,)?")
_VARIABLE = re.compile(r"[A-Za-z_][\w$]*(\.[A-Za-z_][\w$]*)*")
_CALLED_FROM = re.compile(r"\bfrom\s+(?:[\w\"]+\.)?\"?(\w+)\"?\s*\(")
#: Space and comments before the first word.
_LEADING = re.compile(r"\A(?:\s+|--\s[^\n\r]*\n|/\*(?![mM]?!)(?:(?!/\*).)*?\*/)+", re.DOTALL)
#: What is made for one session: by its word, or by the schema where such things are.
_TEMPORARY = re.compile(
    r"""(?ix)\b create\s+(?:or\s+replace\s+)?(?:global\s+|local\s+)?temp(?:orary)?\b | \b(?:pg_)?temp["`\]]?\s*\."""
)
#: A SELECT that leaves its rows in a temporary table, or in a variable of MariaDB.
_INTO = re.compile(r"\binto\s+(?:(?:global\s+|local\s+)?temp(?:orary)?\b|\"?pg_temp\b|@)")
#: Pragmas of SQLite that ask for something by a call; called, any other sets it.
_ASKING = re.compile(r"(?i).*?\bpragma\s+(?:\w+\.)?(?:table_|index_|foreign_key_)\w+")


@lru_cache(maxsize=1024)
def trace_of(sql: str) -> Trace:
    """Tell what a statement may leave behind in its session. Cheap, as every statement of a connection is looked at."""
    start = _LEADING.sub("", sql, count=1)[:24].lower()
    if ";" in sql and ";" in _NOISE.sub(" ", sql).strip().rstrip(";"):
        return UNKNOWN  # the second statement may be any
    if start.startswith(("select", "with", "(")):
        lowered = sql.lower()
        if "set_config" in lowered:
            called = _SET_CONFIG.findall(sql)
            names = frozenset(name.lower() for name, _ in called if name)
            computed = not called or not all(name or param for name, param in called)
            return Trace(names, unknown=computed, names_in_params=any(param for _, param in called))
        if (
            "advisory" in lowered
            or "get_lock" in lowered
            or ":=" in sql
            or _runs_a_function(lowered)
            or _INTO.search(lowered)
        ):
            return NO_TRACE if only_reads(sql) else Trace(unknown=True)
        return NO_TRACE
    word = _WORD.match(start)
    first = word.group() if word else ""
    if first in ("set", "reset"):
        return _set(sql)
    if first in _WRITING:
        return UNKNOWN if first == "create" and _TEMPORARY.search(sql) else _WRITES
    if first in ("begin", "start"):
        return _BEGINS
    if first in ("savepoint", "release") or (first == "rollback" and re.search(r"(?i)\bto\b", sql)):
        return _SAVEPOINT
    if first in ("commit", "end", "rollback", "abort") and not re.search(r"(?i)\bchain\b", sql):
        return _ENDS
    if first in _NEUTRAL or (first == "pragma" and ("foreign_key" in start or _only_asks(sql))):
        return NO_TRACE
    return UNKNOWN


def _only_asks(pragma: str) -> bool:
    return "=" not in pragma and ("(" not in pragma or _ASKING.match(pragma) is not None)


def _runs_a_function(lowered: str) -> bool:
    """Tell whether a SELECT has no table, or a function for one: so are functions called for their effect."""
    return re.search(r"\sfrom\s", lowered) is None or not _HARMLESS.issuperset(_CALLED_FROM.findall(lowered))


def _set(sql: str) -> Trace:
    sql = _LEADING.sub("", sql, count=1)
    lowered = " ".join(sql.lower().split(None, 3)[:3])
    if lowered.startswith("set transaction"):
        return UNKNOWN if ";" in sql.strip().rstrip(";") else _LEVEL
    if lowered.startswith(("set constraints", "set foreign_key_checks", "set unique_checks")):
        return _WRITES  # or means to
    found = _SET.match(sql)
    if found is None or ";" in sql.strip().rstrip(";"):
        return UNKNOWN
    if found["zone"]:
        name = "timezone"
    elif found["role"]:
        name = "role"
    elif found["who"]:
        name = "session_authorization"
    else:
        name = found["name"].replace('"', "").lower()
    if name in ("all", "session", "names", "characteristics"):
        return Trace(unknown=True)
    return Trace(frozenset({name}), local=found["scope"] is not None and found["scope"].lower() == "local")


def names_in(params: Any) -> frozenset[str]:
    """Return the parameters that could be the name of a variable."""
    values = params.values() if isinstance(params, dict) else params or ()
    return frozenset(value.lower() for value in values if isinstance(value, str) and _VARIABLE.fullmatch(value))
