//! What becomes of flows in their tables, in memory.

use dataplane_abi::timeout_s;

use super::*;
use crate::memory::{Memory, addr};

const CLIENT: [u8; 4] = [10, 0, 0, 1];
const BACKEND: [u8; 4] = [10, 0, 0, 2];

fn key(vip: u8) -> FlowKey {
    FlowKey::new(
        addr(CLIENT),
        addr([10, 96, 0, vip]),
        4000u16.to_be(),
        80u16.to_be(),
        proto::TCP,
    )
}

fn opened(tables: &Memory, vip: u8) -> Result<FlowKey, Reason> {
    let backend = Picked {
        addr: addr(BACKEND),
        port: 8080u16.to_be(),
        generation: 1,
        slot: 0,
        direct: false,
        keeps_clients: false,
    };
    let (mut answers, mut entry) = (FlowKey::NONE, Flow::NONE);
    let opening = Opening {
        key: &key(vip),
        service: vip as u32,
        backend: &backend,
        src: addr(CLIENT),
        fresh_port: false,
        seen: SEEN_SYN,
    };
    open(tables, &opening, &mut answers, &mut entry).map(|()| answers)
}

fn found(tables: &Memory, key: &FlowKey) -> Option<Flow> {
    let mut copy = Flow::NONE;
    lookup(tables, key, &mut copy).map(|_entry| copy)
}

fn touch(tables: &Memory, key: &FlowKey, seen: u32) {
    let mut copy = Flow::NONE;
    let entry = lookup(tables, key, &mut copy).unwrap();
    entry.touch(copy.seen, 1, seen);
}

fn answer(tables: &Memory, answers: &FlowKey, seen: u32) {
    let reply = found(tables, answers).unwrap();
    tables.promote(answers, &reply, seen);
}

#[test]
fn a_flow_is_found_from_both_sides_and_answers_lead_back() {
    let tables = Memory::default();
    let answers = opened(&tables, 1).unwrap();
    assert_eq!(
        answers,
        FlowKey::new(
            addr(BACKEND),
            addr(CLIENT),
            8080u16.to_be(),
            4000u16.to_be(),
            proto::TCP
        )
    );
    let reply = found(&tables, &answers).unwrap();
    assert_eq!((reply.other, reply.reply), (key(1), 1));
    assert_eq!(found(&tables, &key(1)).unwrap().other, answers);
}

#[test]
fn the_first_answer_moves_a_flow_where_it_cannot_be_evicted() {
    let tables = Memory::default();
    let answers = opened(&tables, 1).unwrap();
    answer(&tables, &answers, SEEN_SYN);
    assert!(tables.unreplied(&answers).is_none() && tables.unreplied(&key(1)).is_none());
    assert!(tables.flow(&answers).is_some() && tables.flow(&key(1)).is_some());
    assert_eq!(tables.counted(Reason::FlowReplied), 1);
}

#[test]
fn a_full_table_is_counted_and_the_flow_goes_on() {
    let tables = Memory {
        flows_max: 1,
        ..Memory::default()
    };
    let answers = opened(&tables, 1).unwrap();
    answer(&tables, &answers, SEEN_SYN);
    assert_eq!(tables.counted(Reason::FlowTableFull), 1);
    assert!(tables.flow(&key(1)).is_none() && tables.flow(&answers).is_none());
    assert!(found(&tables, &answers).is_some() && found(&tables, &key(1)).is_some());
}

#[test]
fn two_services_with_one_backend_and_one_client_port_do_not_share_a_tuple() {
    let tables = Memory::default();
    let first = opened(&tables, 1).unwrap();
    answer(&tables, &first, SEEN_SYN);
    for (vip, replied) in [(2, true), (3, false), (4, false)] {
        let answers = opened(&tables, vip).unwrap();
        assert_ne!(answers, first);
        assert!(u16::from_be(answers.dport) >= limits::FLOW_PORT_FIRST);
        assert_eq!(found(&tables, &answers).unwrap().other, key(vip));
        if replied {
            answer(&tables, &answers, SEEN_SYN);
        }
    }
    assert_eq!(found(&tables, &first).unwrap().other, key(1));
    assert_eq!(tables.counted(Reason::FlowPortChanged), 3);
}

#[test]
fn a_closed_flows_tuple_is_free_for_another() {
    let tables = Memory::default();
    let first = opened(&tables, 1).unwrap();
    answer(&tables, &first, SEEN_RST);
    assert_eq!(opened(&tables, 2).unwrap(), first);
    assert_eq!(found(&tables, &first).unwrap().other, key(2));
}

#[test]
fn who_forgets_a_flow_leaves_what_another_has_taken_of_it() {
    let tables = Memory::default();
    let first = opened(&tables, 1).unwrap();
    answer(&tables, &first, SEEN_RST);
    let old = found(&tables, &key(1)).unwrap();
    assert_eq!(opened(&tables, 2).unwrap(), first);
    // As if it had been there when the tuple was taken.
    tables.insert_flow(&key(1), &old).unwrap();
    tables.forget(&key(1), &first);
    assert!(found(&tables, &key(1)).is_none());
    assert_eq!(found(&tables, &first).unwrap().other, key(2));
    tables.forget(&key(2), &first);
    assert!(found(&tables, &first).is_none());
}

#[test]
fn a_client_that_has_only_opened_is_soon_forgotten() {
    let tables = Memory::default();
    let answers = opened(&tables, 1).unwrap();
    answer(&tables, &answers, SEEN_SYN);
    let timeout = || {
        let seen = |key| found(&tables, key).unwrap().seen;
        timeout_s(proto::TCP, seen(&key(1)), seen(&answers), 0)
    };
    assert_eq!(timeout(), 60);
    touch(&tables, &key(1), SEEN_SYN);
    touch(&tables, &answers, SEEN_SYN);
    assert_eq!(timeout(), 60);
    touch(&tables, &key(1), 0);
    assert_eq!(timeout(), 86_400);
}

#[test]
fn what_is_left_of_a_flow_that_was_never_answered_takes_no_direct_openings_answers() {
    let tables = Memory::default();
    let answers = opened(&tables, 1).unwrap();
    let direct = answers.mirrored();
    let taken = || {
        let (mut answers, mut flow) = (FlowKey::NONE, Flow::NONE);
        is_taken(&tables, &direct, &mut answers, &mut flow)
    };
    assert!(taken());
    // As if others had needed the room, or another CPU had not yet entered it.
    tables.remove_unreplied(&key(1));
    assert!(!taken() && found(&tables, &answers).is_some());
    tables.clock_s.set(tables.clock_s.get() + ENTERING_S + 1);
    assert!(!taken() && found(&tables, &answers).is_none());
    // The client's side is of another flow by now.
    let first = opened(&tables, 1).unwrap();
    let mut other = found(&tables, &key(1)).unwrap();
    other.other.dport = 1;
    other.seal_under(&key(1));
    tables.insert_unreplied(&key(1), &other, true).unwrap();
    tables.clock_s.set(tables.clock_s.get() + ENTERING_S + 1);
    assert!(!taken() && found(&tables, &first).is_none());
    assert!(found(&tables, &key(1)).is_some());
}

#[test]
fn a_flow_whose_client_may_still_hear_keeps_its_tuple() {
    let tables = Memory::default();
    let first = opened(&tables, 1).unwrap();
    answer(&tables, &first, SEEN_SYN);
    touch(&tables, &key(1), SEEN_FIN);
    assert_ne!(opened(&tables, 2).unwrap(), first);
    // Ended by both it is another's, and the first one's client cannot take it away.
    touch(&tables, &first, SEEN_FIN);
    assert_eq!(opened(&tables, 3).unwrap(), first);
    assert!(found(&tables, &key(1)).is_none());
    assert_eq!(found(&tables, &first).unwrap().other, key(3));
}

#[test]
fn opening_the_same_flow_again_keeps_its_tuple() {
    let tables = Memory::default();
    let first = opened(&tables, 1).unwrap();
    assert_eq!(opened(&tables, 1).unwrap(), first);
    answer(&tables, &first, SEEN_SYN);
    assert_eq!(opened(&tables, 1).unwrap(), first);
}

#[test]
fn an_entry_that_is_anothers_by_now_is_nobodys_flow_and_is_left_alone() {
    let tables = Memory::default();
    let answers = opened(&tables, 1).unwrap();
    let other = opened(&tables, 2).unwrap();
    let strangers = found(&tables, &key(2)).unwrap();
    let own = found(&tables, &key(1)).unwrap();
    let mut copy = Flow::NONE;
    let entry = lookup(&tables, &key(1), &mut copy).unwrap();
    assert_eq!(copy.other, answers);
    // The element is given away between the look and what is noted.
    let give = |flow| {
        let unreplied = tables.unreplied.borrow();
        unreplied[&key(1)].set(flow);
    };
    give(strangers);
    entry.touch(copy.seen, 7, SEEN_FIN);
    entry.locate(copy.seen, 7, 7);
    assert_eq!(tables.unreplied.borrow()[&key(1)].get(), strangers);
    assert!(found(&tables, &key(1)).is_none());
    assert!(!has_ended(
        &tables,
        &answers,
        &found(&tables, &answers).unwrap()
    ));
    // Half of it is.
    give(Flow { other, ..own });
    assert!(found(&tables, &key(1)).is_none());
    // What programs of older versions left says in no way whose it is.
    give(Flow {
        seen: own.seen & SEEN,
        ..own
    });
    assert_eq!(found(&tables, &key(1)).unwrap().other, answers);
}
