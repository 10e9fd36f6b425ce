//! Handing programs to the kernel's verifier, which looks at each path through some of them for 0.2 s.

use std::{
    panic::resume_unwind,
    sync::{Mutex, PoisonError},
    thread,
};

use aya::{
    Ebpf,
    programs::{Program, ProgramError},
};

use super::Error;

/// Loads programs of the object into the kernel, as many at a time as there are CPUs, in the order of their names.
pub fn verify(ebpf: &mut Ebpf, names: &[&'static str]) -> Result<(), Error> {
    if let Some(missing) = names.iter().find(|name| ebpf.program(name).is_none()) {
        return Err(Error::Missing { program: missing });
    }
    let place = |name: &str| names.iter().position(|known| *known == name);
    let mut programs: Vec<(usize, &mut Program)> = ebpf
        .programs_mut()
        .filter_map(|(name, program)| Some((place(name)?, program)))
        .collect();
    programs.sort_by_key(|(place, _)| *place);
    let left = Mutex::new(programs.into_iter());
    let take = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some((place, program)) = take() {
            load(program).map_err(|source| Error::Program {
                program: names[place],
                source: Box::new(source),
            })?;
        }
        Ok(())
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads.min(names.len()))
            .map(|_| scope.spawn(work))
            .collect();
        let own = work();
        let ended = others
            .into_iter()
            .map(|other| other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        ended.fold(own, Result::and)
    })
}

fn load(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::SchedClassifier(program) => program.load(),
        Program::Xdp(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}
