use proptest::prelude::*;

use super::*;

const GIBIBYTE: u64 = 1 << 30;

fn node(state: &Value, children: &[(&str, Snapshot)]) -> Snapshot {
    Snapshot {
        snapshots: children
            .iter()
            .map(|(id, child)| ((*id).to_owned(), child.clone()))
            .collect(),
        snapshot_data: (!state.is_null()).then(|| Data {
            state: state.to_string(),
        }),
    }
}

fn memory_state(memory_bytes: u64) -> Value {
    let mut offset = 0;
    let mappings: Vec<Value> = segments(memory_bytes)
        .into_iter()
        .enumerate()
        .map(|(slot, size)| {
            let gpa = address(offset);
            offset += size;
            json!({ "slot": slot, "gpa": gpa, "size": size, "zone_id": "mem0", "virtio_mem": false, "file_offset": 0 })
        })
        .collect();
    json!({
        "memory_ranges": { "data": [{ "gpa": 0, "length": memory_bytes }] },
        "guest_ram_mappings": mappings,
        "boot_ram": memory_bytes,
    })
}

fn queue(ready: bool, avail: u64, used: u64) -> Value {
    json!({ "max_size": 128, "size": 128, "ready": ready, "desc_table": 0, "avail_ring": avail, "used_ring": used })
}

fn machine(memory_bytes: u64, queues: &[Value]) -> Snapshot {
    let transport = node(&json!({ "device_activated": true, "queues": queues }), &[]);
    let disk = node(&json!({ "disk_path": "/etc/passwd" }), &[]);
    let devices = node(&json!({}), &[("disk0", disk), ("_virtio-pci-disk0", transport)]);
    let memory = node(&memory_state(memory_bytes), &[]);
    node(
        &json!({ "clock": null }),
        &[("device-manager", devices), (MEMORY_MANAGER, memory)],
    )
}

fn facts(memory_bytes: u64, pages: Vec<u64>) -> Facts {
    Facts {
        memory_bytes,
        balloon_bytes: 3,
        room_bytes: 0,
        pages,
    }
}

fn joined(memory_bytes: u64) -> Vec<u8> {
    let snapshot = machine(memory_bytes, &[queue(true, 0x5000, 0x7000)]);
    let state = serde_json::to_vec(&snapshot).unwrap();
    let pages = pages_of_queues(&snapshot, memory_bytes).unwrap();
    let bytes = vec![7; pages.len() * PAGE as usize];
    join(&facts(memory_bytes, pages), &state, &bytes).unwrap()
}

#[test]
fn a_state_comes_back_as_it_was() {
    let captured = split(&joined(GIBIBYTE), GIBIBYTE).unwrap();
    assert_eq!(captured.facts, facts(GIBIBYTE, vec![0x5000, 0x7000]));
    assert_eq!(
        captured.snapshot,
        machine(GIBIBYTE, &[queue(true, 0x5000, 0x7000)])
    );
    assert_eq!(captured.pages, vec![7; 2 * PAGE as usize]);
}

#[test]
fn the_indices_of_all_queues_in_use_are_found() {
    let above = HOLE.end + 0x10_0000;
    let snapshot = machine(
        5 * GIBIBYTE,
        &[
            queue(true, 0x5ffd, 0x9000),
            queue(false, 0x1_0000, 0x2_0000),
            queue(true, 0x5000, above),
        ],
    );
    // 0x5ffd: the index is on the next page.
    let expected = vec![0x5000, 0x5000, 0x9000, above - GIBIBYTE];
    let mut expected: Vec<u64> = expected;
    expected.dedup();
    assert_eq!(pages_of_queues(&snapshot, 5 * GIBIBYTE).unwrap(), expected);
}

#[test]
fn an_index_on_the_edge_of_a_page_is_on_the_next() {
    let snapshot = machine(GIBIBYTE, &[queue(true, 0x5ffe, 0x9000)]);
    assert_eq!(pages_of_queues(&snapshot, GIBIBYTE).unwrap(), [0x6000, 0x9000]);
}

#[test]
fn a_queue_without_memory_is_refused() {
    for ring in [HOLE.start, HOLE.end, GIBIBYTE, u64::MAX] {
        let snapshot = machine(GIBIBYTE, &[queue(true, ring, 0)]);
        assert!(pages_of_queues(&snapshot, GIBIBYTE).is_err(), "{ring:#x}");
        let unused = machine(GIBIBYTE, &[queue(false, ring, 0)]);
        assert_eq!(pages_of_queues(&unused, GIBIBYTE).unwrap(), [0; 0]);
    }
}

#[test]
fn only_what_is_said_of_memory_changes() {
    let before = machine(5 * GIBIBYTE, &[]);
    let filled = [0x5000, 3 * GIBIBYTE + 0x3000];
    let after = parse(&with_memory(before.clone(), 5 * GIBIBYTE, 0, &filled).unwrap()).unwrap();
    let mut expected = memory_state(5 * GIBIBYTE);
    expected["memory_ranges"] = json!({ "data": [
        { "gpa": 0x5000, "length": PAGE },
        { "gpa": HOLE.end + 0x3000, "length": PAGE },
    ] });
    expected["guest_ram_mappings"][1]["file_offset"] = json!(3 * GIBIBYTE);
    let state = |snapshot: &Snapshot| -> Value {
        let data = snapshot.snapshots[MEMORY_MANAGER].snapshot_data.as_ref().unwrap();
        serde_json::from_str(&data.state).unwrap()
    };
    assert_eq!(state(&after), expected);
    let without = |mut snapshot: Snapshot| {
        snapshot.snapshots.remove(MEMORY_MANAGER);
        snapshot
    };
    assert_eq!(without(after), without(before));
}

#[test]
fn memory_of_another_shape_is_refused() {
    assert!(matches!(
        split(&joined(GIBIBYTE), 2 * GIBIBYTE),
        Err(StateError::Memory(_))
    ));
    let changed = |change: fn(&mut Value)| {
        let mut snapshot = machine(GIBIBYTE, &[]);
        let mut state = memory_state(GIBIBYTE);
        change(&mut state);
        snapshot
            .snapshots
            .insert(MEMORY_MANAGER.to_owned(), node(&state, &[]));
        with_memory(snapshot, GIBIBYTE, 0, &[])
    };
    assert!(changed(|_| {}).is_ok());
    assert!(changed(|state| state["guest_ram_mappings"][0]["gpa"] = json!(4096)).is_err());
    assert!(changed(|state| state["guest_ram_mappings"][0]["size"] = json!(4096)).is_err());
    assert!(changed(|state| state["guest_ram_mappings"][0]["zone_id"] = json!("x")).is_err());
    assert!(changed(|state| state["guest_ram_mappings"][0]["virtio_mem"] = json!(true)).is_err());
    assert!(changed(|state| state["guest_ram_mappings"] = json!([])).is_err());
    assert!(changed(|state| state["guest_ram_mappings"] = json!("x")).is_err());
    assert!(changed(|state| *state = json!([])).is_err());
    assert!(matches!(
        with_memory(node(&Value::Null, &[]), GIBIBYTE, 0, &[]),
        Err(StateError::NoMemory)
    ));
}

/// What may be added, and what the guest has of it, as the device tells it.
fn room(addr: u64, region_size: u64, plugged: u64, requested: u64, blocks: &[bool]) -> Value {
    json!({
        "avail_features": 1,
        "acked_features": 1,
        "config": {
            "block_size": 2 << 20, "node_id": 0, "padding": [0, 0, 0, 0, 0, 0], "addr": addr,
            "region_size": region_size, "usable_region_size": region_size,
            "plugged_size": plugged, "requested_size": requested,
        },
        "blocks_state": { "bitmap": blocks },
    })
}

fn with_room(memory_bytes: u64, rooms: &[Value]) -> Snapshot {
    let mut snapshot = machine(memory_bytes, &[]);
    for (number, room) in rooms.iter().enumerate() {
        let devices = snapshot.snapshots.get_mut("device-manager").unwrap();
        devices.snapshots.insert(format!("mem{number}"), node(room, &[]));
    }
    snapshot
}

#[test]
fn a_guest_that_has_memory_beside_its_own_is_refused() {
    let (place, size) = (4 * GIBIBYTE, GIBIBYTE);
    let check = |room: Value| check_added(&with_room(GIBIBYTE, &[room]), GIBIBYTE, size);
    assert!(check(room(place, size, 0, 0, &[false; 4])).is_ok());
    let has = |plugged: u64, requested: u64, blocks: &[bool]| {
        matches!(
            check(room(place, size, plugged, requested, blocks)),
            Err(StateError::InUse(bytes)) if bytes == plugged.max(requested)
        )
    };
    assert!(has(2 << 20, 0, &[true, false]));
    // It may take some at any time.
    assert!(has(0, 4 << 20, &[false, false]));
    assert!(has(0, 0, &[false, true]));
}

#[test]
fn room_for_more_is_where_and_what_it_must_be() {
    let (place, size) = (4 * GIBIBYTE, GIBIBYTE);
    let empty = |addr, size| room(addr, size, 0, 0, &[]);
    let refused = |rooms: &[Value], size: u64| {
        matches!(
            check_added(&with_room(GIBIBYTE, rooms), GIBIBYTE, size),
            Err(StateError::Memory(_))
        )
    };
    assert!(!refused(&[], 0));
    assert!(refused(&[], size), "what has it is not seen");
    assert!(refused(&[empty(place, size)], 0));
    assert!(refused(&[empty(place, size), empty(place, size)], size));
    assert!(refused(&[empty(place + (128 << 20), size)], size));
    assert!(refused(&[empty(place, 2 * size)], size));
    // Behind memory above the hole.
    let above = with_room(5 * GIBIBYTE, &[empty(6 * GIBIBYTE, size)]);
    assert!(check_added(&above, 5 * GIBIBYTE, size).is_ok());
}

#[test]
fn room_for_more_is_a_piece_without_a_file() {
    let snapshot = |gpa: u64, virtio_mem: bool| {
        let mut state = memory_state(5 * GIBIBYTE);
        state["guest_ram_mappings"].as_array_mut().unwrap().push(json!({
            "slot": 2, "gpa": gpa, "size": GIBIBYTE, "zone_id": "mem0", "virtio_mem": virtio_mem, "file_offset": 0,
        }));
        node(&json!({}), &[(MEMORY_MANAGER, node(&state, &[]))])
    };
    let written = with_memory(snapshot(6 * GIBIBYTE, true), 5 * GIBIBYTE, GIBIBYTE, &[]).unwrap();
    let written = parse(&written).unwrap();
    let data = written.snapshots[MEMORY_MANAGER].snapshot_data.as_ref().unwrap();
    let state: Value = serde_json::from_str(&data.state).unwrap();
    assert_eq!(state["guest_ram_mappings"][1]["file_offset"], 3 * GIBIBYTE);
    assert_eq!(state["guest_ram_mappings"][2]["file_offset"], 0);
    assert!(with_memory(snapshot(6 * GIBIBYTE, true), 5 * GIBIBYTE, 0, &[]).is_err());
    assert!(with_memory(snapshot(6 * GIBIBYTE, false), 5 * GIBIBYTE, GIBIBYTE, &[]).is_err());
    assert!(with_memory(snapshot(7 * GIBIBYTE, true), 5 * GIBIBYTE, GIBIBYTE, &[]).is_err());
}

#[test]
fn a_state_from_before_there_was_room_for_more_has_none() {
    let old = json!({ "memory_bytes": GIBIBYTE, "balloon_bytes": 3, "pages": [] });
    let facts_read: Facts = serde_json::from_value(old).unwrap();
    assert_eq!(facts_read, facts(GIBIBYTE, Vec::new()));
}

#[test]
fn pages_beyond_memory_are_refused() {
    for page in [GIBIBYTE, 1, u64::MAX - 4095] {
        let state = serde_json::to_vec(&machine(GIBIBYTE, &[])).unwrap();
        let bytes = join(&facts(GIBIBYTE, vec![page]), &state, &vec![0; PAGE as usize]).unwrap();
        assert!(
            matches!(split(&bytes, GIBIBYTE), Err(StateError::Queue(_))),
            "{page:#x}"
        );
    }
}

proptest! {
    #[test]
    fn a_state_that_was_cut_off_is_refused(cut in 0.0_f64..1.0) {
        let bytes = joined(GIBIBYTE);
        let length = (bytes.len() as f64 * cut) as usize;
        prop_assert!(split(&bytes[..length], GIBIBYTE).is_err());
    }

    /// Whatever the bytes are, they are judged without harm.
    #[test]
    fn noise_is_judged(noise in proptest::collection::vec(any::<u8>(), 0..200), at in 0_usize..1 << 16) {
        let _ = split(&noise, GIBIBYTE);
        let mut bytes = joined(GIBIBYTE);
        let start = at % bytes.len();
        let end = (start + noise.len()).min(bytes.len());
        bytes[start..end].copy_from_slice(&noise[..end - start]);
        if let Ok(captured) = split(&bytes, GIBIBYTE) {
            let _ = pages_of_queues(&captured.snapshot, GIBIBYTE);
            let _ = check_added(&captured.snapshot, GIBIBYTE, captured.facts.room_bytes);
            let _ = with_memory(captured.snapshot, GIBIBYTE, 0, &captured.facts.pages);
        }
    }

    #[test]
    fn addresses_and_offsets_agree(offset_in in 0_u64..8 * GIBIBYTE) {
        prop_assert_eq!(offset(address(offset_in), 8 * GIBIBYTE), Some(offset_in));
    }
}
