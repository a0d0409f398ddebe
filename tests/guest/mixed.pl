#!/usr/bin/perl
# Guest job: the same mixed workload on every add-cow disk and on a flat disk; they must stay equal.
#
# Relies on the disks' serial numbers (see tests/guest/run): `flat` is a plain raw disk with the
# content that the add-cow disks begin with. Two processes, each on its own processor and so on
# its own virtqueue, own alternating stripes of sectors. Stripes are not aligned to clusters, so
# both processes write parts of the same clusters at the same time. Everything goes past the guest's
# page cache. In the middle it asks for the daemons to be restarted, and goes on until that is done.
#
# Discarded ranges are written again before anybody reads them: what a discarded sector reads as
# is not determined.
use strict;
use warnings;
use Fcntl qw(O_RDWR O_DIRECT);
use IO::Handle;

use constant {
    SECTOR => 512,
    BLKDISCARD => 0x1277,
    BLKZEROOUT => 0x127f,
    SYS_FALLOCATE => 285,
    FALLOC_PUNCH_HOLE_KEEP_SIZE => 3,
    LARGEST_BYTES => 1 << 20,
    OPERATIONS => 400,        # per process, at least
    RESTARTED => '/run/restarted',
};

STDOUT->autoflush(1);
my @disks = ('flat', grep { device_of($_) } qw(c512 c4k c64k c2m));
die "no add-cow disk here\n" if @disks < 2;
my $sectors = read_number('/sys/block/' . device_of('flat') . '/size');

# Direct I/O wants aligned memory: a long string, used from its first aligned byte on.
my $write_buffer = 'x' x (LARGEST_BYTES + 4096);
my $write_start = -unpack('J', pack('p', $write_buffer)) & 4095;
my $read_buffer = 'y' x (LARGEST_BYTES + 4096);
my $read_start = -unpack('J', pack('p', $read_buffer)) & 4095;

compare_disks('before the workload');
my @children = map { start_worker($_) } 0, 1;  # the first one asks for the restart
my $answer = <STDIN>;
open my $mark, '>', RESTARTED or die "@{[RESTARTED]}: $!\n";
print "daemons are back, the workload goes on\n";
for my $child (@children) {
    waitpid $child, 0;
    die "a worker failed\n" if $?;
}
compare_disks('after the workload');
for my $disk (grep { device_of("view-$_") } @disks) {
    system('dd', 'if=/dev/' . device_of($disk), 'of=/dev/' . device_of("view-$disk"), 'bs=1M',
        'iflag=direct', 'conv=fsync', 'status=none') == 0 or die "cannot copy $disk\n";
}

# The kernel's name (vdX) of the disk with this serial number, or nothing.
sub device_of {
    my ($serial) = @_;
    for my $file (glob '/sys/block/vd*/serial') {
        open my $in, '<', $file or die "$file: $!\n";
        my $line = <$in> // '';
        $line =~ s/[\s\0]+$//;
        return (split m{/}, $file)[3] if $line eq $serial;
    }
    return;
}

sub read_number {
    my ($file) = @_;
    open my $in, '<', $file or die "$file: $!\n";
    return 0 + <$in>;
}

sub open_disks {
    return map {
        sysopen my $handle, '/dev/' . device_of($_), O_RDWR | O_DIRECT or die "$_: $!\n";
        $handle;
    } @disks;
}

sub write_at {
    my ($handle, $sector, $data) = @_;
    substr $write_buffer, $write_start, length $data, $data;
    sysseek $handle, $sector * SECTOR, 0 or die "seek: $!\n";
    my $done = syswrite $handle, $write_buffer, length $data, $write_start;
    die "write at sector $sector: $!\n" unless defined $done && $done == length $data;
}

sub read_at {
    my ($handle, $sector, $count) = @_;
    sysseek $handle, $sector * SECTOR, 0 or die "seek: $!\n";
    my $done = sysread $handle, $read_buffer, $count * SECTOR, $read_start;
    die "read at sector $sector: $!\n" unless defined $done && $done == $count * SECTOR;
    return substr $read_buffer, $read_start, $done;
}

# Forks a process that does its share of the operations on all disks.
sub start_worker {
    my ($number) = @_;
    my $child = fork // die "fork: $!\n";
    return $child if $child;
    system("taskset -cp $number $$ >/dev/null") == 0 or die "taskset failed\n";
    srand 4711 + $number;
    my @handles = open_disks();
    my $turn = 0;
    until ($turn >= OPERATIONS && -e RESTARTED) {
        ++$turn;
        print "restart the daemons\n" if $number == 0 && $turn == OPERATIONS / 2;
        operate($number, $turn, @handles);
    }
    print "process $number: $turn operations on every disk\n";
    $_->sync or die "sync: $!\n" for @handles;
    exit 0;
}

# A random range of sectors that only this process touches: (first, count). A third of them lie
# in a small hot area of one-sector stripes, a third in short stripes, a third in long ones.
sub own_range {
    my ($number) = @_;
    my ($from, $to, $stripe) = @{([2048, 4096, 1], [4096, $sectors / 2, 37],
        [$sectors / 2, $sectors, 1501])[int rand 3]};
    my $pairs = int(($to - $from) / (2 * $stripe));
    my $first = int($from) + (2 * int(rand($pairs)) + $number) * $stripe;
    my $skip = int rand $stripe;
    return ($first + $skip, 1 + int rand($stripe - $skip));
}

# One random operation, done to every disk.
sub operate {
    my ($number, $turn, @handles) = @_;
    my ($first, $count) = own_range($number);
    my $choice = rand 100;
    if ($choice < 55) {
        my $data = new_data($number, $turn, $first, $count);
        write_at($_, $first, $data) for @handles;
    } elsif ($choice < 65) {
        control($_, BLKZEROOUT, $first, $count) for @handles;
    } elsif ($choice < 72) {
        for my $handle (@handles) {
            syscall(SYS_FALLOCATE, fileno $handle, FALLOC_PUNCH_HOLE_KEEP_SIZE, $first * SECTOR,
                $count * SECTOR) == 0 or die "punch hole at sector $first: $!\n";
        }
    } elsif ($choice < 82) {
        my $data = new_data($number, $turn, $first, $count);
        for my $handle (@handles) {
            control($handle, BLKDISCARD, $first, $count);
            write_at($handle, $first, $data);
        }
    } elsif ($choice < 97) {
        my ($expected, @others) = map { read_at($_, $first, $count) } @handles;
        for my $index (0 .. $#others) {
            next if $others[$index] eq $expected;
            die "turn $turn: $disks[$index + 1] differs in sectors $first + $count\n";
        }
    } else {
        $_->sync or die "sync: $!\n" for @handles;
    }
}

# An ioctl that takes a range in bytes.
sub control {
    my ($handle, $request, $first, $count) = @_;
    my $range = pack 'QQ', $first * SECTOR, $count * SECTOR;
    ioctl $handle, $request, $range or die "ioctl $request at sector $first: $!\n";
}

# Data that names its writer, its turn and its place in every sector.
sub new_data {
    my ($number, $turn, $first, $count) = @_;
    return join '', map { pack 'A512', "worker $number turn $turn sector " . ($first + $_) . ' ' }
        0 .. $count - 1;
}

# Reads all disks from end to end past the cache and compares them with the flat one.
sub compare_disks {
    my ($when) = @_;
    my @handles = open_disks();
    my $step = LARGEST_BYTES / SECTOR;
    for (my $first = 0; $first < $sectors; $first += $step) {
        my $count = $first + $step > $sectors ? $sectors - $first : $step;
        my ($expected, @others) = map { read_at($_, $first, $count) } @handles;
        for my $index (0 .. $#others) {
            die "$when: $disks[$index + 1] differs from the flat disk in sectors $first + $count\n"
                if $others[$index] ne $expected;
        }
    }
    print "$when: @disks[1 .. $#disks] equal the flat disk\n";
}
