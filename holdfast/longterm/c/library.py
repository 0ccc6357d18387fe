"""What functions of C's standard library do with the pointers they are given; they keep none."""

_TEXT_AT = (
    "strlen:0 strdup:0 atoi:0 atol:0 atof:0 strtol:0 strtoul:0 strtod:0 puts:0 getenv:0 remove:0 "
    "perror:0 system:0 printf:0 scanf:0 strchr:0 strrchr:0 fputs:0 strncmp:0,1 strcmp:0,1 "
    "strstr:0,1 fopen:0,1 rename:0,1 strcspn:0,1 strspn:0,1 sscanf:0,1 strcpy:1 strcat:1 strncpy:1 "
    "strncat:1 sprintf:1 fprintf:1 snprintf:2"
)
_SIZED = (
    "memcpy:0,2 memcpy:1,2 memmove:0,2 memmove:1,2 memcmp:0,2 memcmp:1,2 memset:0,2 memchr:0,2 "
    "strncpy:0,2 fgets:0,1 snprintf:0,1 read:1,2 write:1,2"
)
_OTHERS = (
    "free exit abort assert putchar getchar fclose fread fwrite fflush fgetc fputc rand srand time "
    "isalpha isdigit isspace isupper islower isalnum ispunct toupper tolower abs labs"
)


def _numbers(table: str) -> list[tuple[str, tuple[int, ...]]]:
    entries = (entry.split(":") for entry in table.split())
    return [(name, tuple(map(int, at.split(",")))) for name, at in entries]


# Arguments that are text; (argument, argument that says its elements or bytes).
TEXT_AT: dict[str, tuple[int, ...]] = dict(_numbers(_TEXT_AT))
SIZED: dict[str, list[tuple[int, ...]]] = {}
for _name, _pair in _numbers(_SIZED):
    SIZED.setdefault(_name, []).append(_pair)
GIVES_TEXT = {"strdup", "strchr", "strrchr", "strstr", "getenv"}
# They write to their first argument as long as they like.
BLIND = {"strcpy", "strcat", "sprintf", "gets"}
ALLOCATES = {"malloc", "calloc", "realloc"}
LIBRARY = {*TEXT_AT, *SIZED, *BLIND, *ALLOCATES, *_OTHERS.split()}
