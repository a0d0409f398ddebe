# The picture of a disk: 2 MiB of backing file with data in its first half, under a disk of 4 MiB
# whose clusters of 64 KiB from 8 on are its own: 8 to 15, 20, and all of the last quarter.
sparse base.img 2M
fill_clusters base.img 0 16
addcow create -q -b base.img -F raw --cluster-size 64k disk.add-cow 4M
poke disk.add-cow 65536 '\000\377\020\000\000\000\377\377'
fill_clusters disk.raw 8 8
fill_clusters disk.raw 20 1
fill_clusters disk.raw 48 16
t addcow map --picture disk.add-cow
LC_ALL=C.UTF-8 t addcow map --picture disk.add-cow

echo '# which locale it is'
legend() {
    env -u LC_ALL "$@" addcow map --picture disk.add-cow | tail -n 1
}
legend LANG=de_DE.utf8
legend LC_CTYPE=C LANG=de_DE.utf8
legend LC_ALL= LC_CTYPE= LANG=en_US.UTF-8
legend LC_ALL=C LC_CTYPE=en_US.UTF-8

echo '# a part'
t addcow map --picture --start-offset 512k --max-length 1M disk.add-cow
t addcow map --picture --start-offset 512k --max-length 3 disk.add-cow
t addcow map --picture --start-offset 4M disk.add-cow

echo '# clusters that were allocated and have been punched are zeros; a raw image; an empty disk'
addcow create -q plain.add-cow 1M
t addcow map --picture plain.add-cow
t addcow map --picture -f raw base.img

echo '# in a terminal of 40 columns, and in a wide one'
in_terminal() {
    script -qec "stty cols $1; $2" /dev/null < /dev/null | tr -d '\r'
}
in_terminal 40 'addcow map disk.add-cow'
in_terminal 200 'addcow map --picture disk.add-cow'
in_terminal 0 'addcow map --picture disk.add-cow'
in_terminal 40 'addcow map --output=json --max-length 64k disk.add-cow'

echo '# not for programs'
refused addcow map --picture --output json disk.add-cow
