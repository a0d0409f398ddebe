#!/bin/sh
# Guest job: what boot-write.sh has written is there, and what it has removed is not.
set -eu
(cd /srv/boot && sha256sum --quiet -c /root/manifest)
[ ! -e /usr/share/perl5 ]
echo "$(wc -l </root/manifest) files are whole"
