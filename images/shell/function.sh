#!/bin/sh
# A function in shell: tells what it was given, as one JSON object on stdout.
# The event's attributes are in the environment as CE_*, its data is on stdin.
set -eu

# A JSON string of what is on stdin. Control characters that JSON would want as \u00XX go.
quoted() {
    tr -d '\000-\010\013\014\016-\037' | awk '
        BEGIN { printf "\"" }
        {
            gsub(/\\/, "&&"); gsub(/"/, "\\\""); gsub(/\t/, "\\t"); gsub(/\r/, "\\r")
            printf "%s%s", (NR > 1 ? "\\n" : ""), $0
        }
        END { print "\"" }'
}

attribute() { printf '%s' "$1" | quoted; }

printf '{"id":%s,"source":%s,"type":%s,"subject":%s,"data":%s}\n' \
    "$(attribute "${CE_ID-}")" "$(attribute "${CE_SOURCE-}")" "$(attribute "${CE_TYPE-}")" \
    "$(attribute "${CE_SUBJECT-}")" "$(quoted)"
