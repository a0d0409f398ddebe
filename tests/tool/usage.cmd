# Command lines that are not understood: one line, exit code 1, as qemu-img.
refused addcow
refused addcow frobnicate
refused addcow --frobnicate
refused addcow info
refused addcow check
refused addcow map
refused addcow info a b
refused addcow info --output=xml disk.add-cow
refused addcow info -f vmdk disk.add-cow
refused addcow map --start-offset x disk.add-cow
refused addcow map --output=jsn disk.add-cow
t addcow --version
t addcow --help
t addcow create --help
t addcow info --help
t addcow check --help
t addcow map --help

echo '# nobody reads, or nobody can'
addcow --help | true
addcow create -q disk.add-cow 1M
refused sh -c "addcow info disk.add-cow > /dev/full"
