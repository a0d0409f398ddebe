//! Seeded mixed workloads against a flat model, through the whole daemon.
//!
//! Reads, writes, write-zeroes, discards and flushes of any length and framing on several queues
//! at once; afterwards the disk, the files and a second daemon agree with the model byte by byte.
//! `ADDCOW_SEED=N` runs another sequence.
//!
//! Not here: faults and crashes.

mod common;

use common::disk::{Disk, Shape};
use common::guest::{F_EVENT_IDX, F_INDIRECT, F_WRITE_ZEROES, Setup};
use common::model::{Model, Workload};
use common::request::{Framing, OK, Request};
use common::rng::Rng;
use common::{KIB, MIB, SECTOR, assert_bytes, pattern, to_u64, to_usize};

/// Runs the workload on a disk of `shape` in three lives of the daemon.
fn agrees_with_the_model(shape: Shape, seed: u64) {
    let disk = Disk::create(shape);
    let base = disk.shape.base.map(|_| disk.base_file());
    let mut model = Model::new(disk.initial());
    let mut workload = Workload::new(seed);
    let lives = [
        (Setup::queues(2, 128), &["--num-queues", "2"][..]),
        (Setup::without(F_INDIRECT | F_EVENT_IDX), &["--cache", "buffered"]),
        (Setup::queues(4, 64), &["--num-queues", "4"]),
    ];
    for (setup, options) in lives {
        let mut daemon = disk.serve(options);
        let mut guest = daemon.guest(setup);
        Workload::verify(&mut guest, &mut model);
        workload.run(&mut guest, &mut model, 60);
        Workload::verify(&mut guest, &mut model);
        drop(guest);
        daemon.stop();
        assert_bytes(&disk.flat_view(), &model.bytes, "the files after a clean stop");
    }
    if let Some(base) = base {
        assert_bytes(&disk.base_file(), &base, "the base file");
    }
}

#[test]
fn workload_with_4k_clusters_and_a_short_base_agrees_with_the_model() {
    let shape = Shape::new(6 * MIB + 3 * 512, 4 * KIB).base(3 * MIB + 512);
    agrees_with_the_model(shape, 1001);
}

#[test]
fn workload_on_tmpfs_agrees_with_the_model() {
    let shape = Shape::new(6 * MIB + 3 * 512, 4 * KIB).base(3 * MIB + 512);
    agrees_with_the_model(shape.in_memory(), 1004);
}

#[test]
fn workload_with_64k_clusters_and_a_short_base_agrees_with_the_model() {
    let shape = Shape::new(9 * MIB + 512, 64 * KIB).base(5 * MIB + 7 * 512);
    agrees_with_the_model(shape, 1002);
}

#[test]
fn workload_with_2m_clusters_and_a_short_base_agrees_with_the_model() {
    let shape = Shape::new(9 * MIB + 3 * 512, 2 * MIB).base(5 * MIB + 512);
    agrees_with_the_model(shape, 1003);
}

#[test]
fn workload_with_a_base_longer_than_the_disk_agrees_with_the_model() {
    let shape = Shape::new(3 * MIB + 512, 64 * KIB).base(4 * MIB);
    agrees_with_the_model(shape, 1004);
}

#[test]
fn workload_without_a_base_agrees_with_the_model() {
    agrees_with_the_model(Shape::new(4 * MIB + 512, 64 * KIB).no_base(), 1005);
}

#[test]
fn workload_in_write_through_mode_agrees_with_the_model_in_the_files_at_once() {
    let disk = Disk::create(Shape::new(3 * MIB, 16 * KIB));
    let mut daemon = disk.serve(&["--cache", "writethrough", "--num-queues", "2"]);
    let mut guest = daemon.guest(Setup::queues(2, 128));
    let mut model = Model::new(disk.initial());
    let mut workload = Workload::new(1006);
    for _ in 0..8 {
        workload.run(&mut guest, &mut model, 4);
        Workload::verify(&mut guest, &mut model);
        assert_bytes(&disk.flat_view(), &model.bytes, "the files between requests");
    }
}

#[test]
fn partial_writes_to_one_cluster_from_several_queues_do_not_lose_each_other() {
    for (cluster, queues) in [(64 * KIB, 2), (64 * KIB, 4), (2 * MIB, 2), (4 * KIB, 2)] {
        let disk = Disk::create(Shape::new(8 * MIB, cluster));
        let count = queues.to_string();
        let mut daemon = disk.serve(&["--num-queues", &count]);
        let mut guest = daemon.guest(Setup::queues(queues, 256));
        let mut model = Model::new(disk.initial());
        let mut rng = Rng::new(cluster + to_u64(queues));
        let sectors = cluster / 512;
        for index in 0..(8 * MIB / cluster).min(40) {
            let mut flying = vec![0; queues];
            // Every third sector stays as the base has it.
            for sector in (index * sectors..(index + 1) * sectors).filter(|s| s % 3 != 0).take(120)
            {
                let queue = rng.index(queues);
                let data = pattern(index, sector, SECTOR);
                let framing = Framing { indirect: rng.one_in(2), ..Framing::joined() };
                guest.submit(queue, &Request::write(sector, &data), &framing);
                model.write(sector, &data);
                flying[queue] += 1;
            }
            (0..queues).for_each(|queue| guest.rings[queue].kick_always());
            for (queue, count) in flying.into_iter().enumerate() {
                for _ in 0..count {
                    assert_eq!(guest.finish(queue).1.status(), OK);
                }
            }
        }
        Workload::verify(&mut guest, &mut model);
    }
}

#[test]
fn zeroes_and_writes_to_one_cluster_from_two_queues_do_not_lose_each_other() {
    let disk = Disk::create(Shape::new(8 * MIB, 64 * KIB));
    let mut daemon = disk.serve(&["--num-queues", "2"]);
    let mut guest = daemon.guest(Setup::queues(2, 256));
    assert_ne!(guest.features & F_WRITE_ZEROES, 0);
    let mut model = Model::new(disk.initial());
    for index in 0..100 {
        let first = 128 * index;
        guest.submit(0, &Request::write_zeroes(&[(first, 30, 1)]), &Framing::joined());
        let data = pattern(index, first + 30, 40 * SECTOR);
        guest.submit(1, &Request::write(first + 30, &data), &Framing::joined());
        guest.submit(0, &Request::discard(&[(first + 70, 20, 0)]), &Framing::joined());
        guest.submit(1, &Request::write_zeroes(&[(first + 90, 38, 0)]), &Framing::joined());
        guest.kick(0);
        guest.kick(1);
        for queue in [0, 0, 1, 1] {
            assert_eq!(guest.finish(queue).1.status(), OK);
        }
        model.zero(first, 30);
        model.write(first + 30, &data);
        model.discard(first + 70, 20);
        model.zero(first + 90, 38);
    }
    Workload::verify(&mut guest, &mut model);
}

#[test]
fn read_during_first_writes_sees_each_sector_old_or_new() {
    let disk = Disk::create(Shape::new(8 * MIB, 64 * KIB));
    let mut daemon = disk.serve(&["--num-queues", "2"]);
    let mut guest = daemon.guest(Setup::queues(2, 128));
    let initial = disk.initial();
    for index in 0..60 {
        let first = 128 * index;
        let data = pattern(3, first + 50, 9 * SECTOR);
        guest.submit(1, &Request::read(first, 128 * SECTOR), &Framing::joined());
        guest.submit(0, &Request::write(first + 50, &data), &Framing::joined());
        guest.submit(1, &Request::read(first, 128 * SECTOR), &Framing::joined());
        guest.rings[0].kick_always();
        guest.rings[1].kick_always();
        assert_eq!(guest.finish(0).1.status(), OK);
        for _ in 0..2 {
            let (_, reply) = guest.finish(1);
            assert_eq!(reply.status(), OK);
            for (at, piece) in reply.data().chunks(SECTOR).enumerate() {
                let old = &initial[(to_usize(first) + at) * SECTOR..][..SECTOR];
                let new = (50..59).contains(&at).then(|| &data[(at - 50) * SECTOR..][..SECTOR]);
                let legal = piece == old || Some(piece) == new;
                assert!(legal, "sector {at} of cluster {index} is neither old nor new");
            }
        }
    }
}
