//! Programs on an interface as filters of traffic control: the clsact qdisc, and one filter in each direction. Kernels before Linux 6.6
//! know nothing else.
//!
//! The kernel sets such a filter without waiting for anybody, and it goes with its interface. A tcx link makes the kernel wait for
//! every CPU when it comes and when it goes, 4 to 16 ms each (measured on 6.18), and nobody can change any interface meanwhile.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};

use super::netlink::Step;
use super::{Kernel, NetlinkError};

/// Which packets a filter sees, from where the interface is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Direction {
    Ingress,
    Egress,
}

/// A program for one direction.
#[derive(Clone, Copy, Debug)]
pub struct Filter<'a> {
    pub direction: Direction,
    pub name: &'static str,
    pub program: BorrowedFd<'a>,
}

/// Ours are the only ones of their priority, which is the first.
const PRIORITY: u32 = 1;
const HANDLE: u32 = 1;
/// Every protocol, in the order of bytes on the wire.
const ETH_P_ALL: u32 = 0x0003_u16.to_be() as u32;
const CLSACT: &str = "clsact";

impl Kernel {
    /// Sets the filters of an interface: the next packet sees the new programs, whether there were others before or not.
    pub fn set_filters(&mut self, index: u32, filters: &[Filter<'_>]) -> Result<(), NetlinkError> {
        let mut steps = vec![add_clsact(index)];
        steps.extend(filters.iter().map(|filter| set_filter(index, filter)));
        self.run(steps)
    }

    /// The names of the programs that ours are by now on an interface, in a direction; none is on one that is gone.
    pub fn filter_names(
        &mut self,
        index: u32,
        direction: Direction,
    ) -> Result<Vec<String>, NetlinkError> {
        let mut message = TcMessage::with_index(index as i32);
        message.header.parent = parent(direction);
        let answers = self.netlink.dump(
            || format!("list filters of interface {index}"),
            RouteNetlinkMessage::GetTrafficFilter(message),
        )?;
        let name = |answer: RouteNetlinkMessage| {
            let RouteNetlinkMessage::NewTrafficFilter(filter) = answer else {
                return None;
            };
            if filter.header.info >> 16 != PRIORITY || u32::from(filter.header.handle) != HANDLE {
                return None;
            }
            filter.attributes.into_iter().find_map(program_name)
        };
        Ok(answers.into_iter().filter_map(name).collect())
    }

    /// Takes filters of ours from an interface, where their programs have one of these names; says whether there were any. Those of
    /// others stay.
    pub fn remove_filters(&mut self, index: u32, names: &[&str]) -> Result<bool, NetlinkError> {
        let mut steps = Vec::new();
        for direction in [Direction::Ingress, Direction::Egress] {
            let here = self.filter_names(index, direction)?;
            if here.iter().any(|name| names.contains(&name.as_str())) {
                steps.push(Step {
                    operation: format!("take our filter from interface {index}"),
                    message: RouteNetlinkMessage::DelTrafficFilter(place(index, direction)),
                    flags: 0,
                });
            }
        }
        let any = !steps.is_empty();
        self.run(steps)?;
        Ok(any)
    }

    /// Interfaces that can have filters.
    pub fn with_clsact(&mut self) -> Result<BTreeSet<u32>, NetlinkError> {
        self.links_with(CLSACT)
    }
}

fn program_name(attribute: TcAttribute) -> Option<String> {
    let TcAttribute::Options(options) = attribute else {
        return None;
    };
    options.into_iter().find_map(|option| match option {
        TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => Some(name),
        _ => None,
    })
}

/// The qdisc that filters hang on; one that is there stays.
fn add_clsact(index: u32) -> Step {
    let mut message = TcMessage::with_index(index as i32);
    message.header.handle = TcHandle {
        minor: 0,
        ..TcHandle::CLSACT
    };
    message.header.parent = TcHandle::CLSACT;
    message.attributes.push(TcAttribute::Kind(CLSACT.into()));
    Step {
        operation: format!("let interface {index} have filters"),
        message: RouteNetlinkMessage::NewQueueDiscipline(message),
        flags: NLM_F_CREATE,
    }
}

/// Where our filter of a direction is.
fn place(index: u32, direction: Direction) -> TcMessage {
    let mut message = TcMessage::with_index(index as i32);
    message.header.parent = parent(direction);
    message.header.handle = HANDLE.into();
    message.header.info = PRIORITY << 16 | ETH_P_ALL;
    message
}

fn set_filter(index: u32, filter: &Filter<'_>) -> Step {
    let mut message = place(index, filter.direction);
    let options = [
        TcFilterBpfOption::ProgFd(filter.program.as_raw_fd() as u32),
        TcFilterBpfOption::ProgName(filter.name.into()),
        TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
    ];
    message.attributes = vec![
        TcAttribute::Kind(TcFilterBpf::KIND.into()),
        TcAttribute::Options(options.map(TcOption::Bpf).into()),
    ];
    Step {
        operation: format!("hang {} on interface {index}", filter.name),
        message: RouteNetlinkMessage::NewTrafficFilter(message),
        flags: NLM_F_CREATE,
    }
}

fn parent(direction: Direction) -> TcHandle {
    TcHandle {
        minor: match direction {
            Direction::Ingress => TcHandle::MIN_INGRESS,
            Direction::Egress => TcHandle::MIN_EGRESS,
        },
        ..TcHandle::CLSACT
    }
}
