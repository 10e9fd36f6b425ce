//! `keelway-bench gate`: counts that must not grow unnoticed, held against a file in the project.
//!
//! Only what is the same on every machine is gated: instructions, stack, calls of helpers and of other functions of each program as
//! compiled, operations on the maps per change of the cluster, and, as root on the kernel that the file names, how much the verifier
//! looks at. Times are for `service`, `sync` and `compare`.

mod changes;
mod object;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use keelway_agent::dataplane::{Config, Dataplane};
use keelway_tests::sandbox::Sandbox;
use serde::{Deserialize, Serialize};

use self::object::helper;

#[derive(Debug, clap::Args)]
pub struct Flags {
    /// File with the counts to hold.
    #[arg(long, default_value = "bench/gate.json")]
    baseline: PathBuf,
    /// Write what is there now into the file; what changed is printed, for the commit message.
    #[arg(long)]
    update: bool,
}

/// The counts of one build.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    /// Major and minor version of the kernel whose verifier counted; empty when none did.
    pub kernel: String,
    /// Name of a count, which ends with its quantity, to its value.
    pub counts: BTreeMap<String, u64>,
}

/// How much a count may grow, in percent. Compilers of one version build the same instructions; a change of a few comes with
/// changes elsewhere, while one lookup more per packet is one lookup more.
const TOLERANCE: [(&str, u64); 5] = [
    ("instructions", 3),
    ("verified", 15),
    ("stack", 0),
    ("calls", 0),
    ("operations", 0),
];

const VERIFIED: &str = ".verified";

/// Measures, and compares or writes.
pub fn run(flags: &Flags) -> Result<ExitCode> {
    let now = Counts::take()?;
    let shown = flags.baseline.display();
    let baseline = match fs::read_to_string(&flags.baseline) {
        Ok(text) => serde_json::from_str(&text)
            .with_context(|| format!("{shown} is no baseline of the gate"))?,
        Err(error) if flags.update && error.kind() == std::io::ErrorKind::NotFound => {
            Counts::default()
        }
        Err(error) => return Err(error).context(format!("{shown}; from the project's root?")),
    };
    let judgement = Judgement::of(&baseline, &now);
    if flags.update {
        for change in judgement.faults.iter().chain(&judgement.remarks) {
            println!("{change}");
        }
        let kept = now.or_verified_by(&baseline);
        let text = serde_json::to_string_pretty(&kept)? + "\n";
        fs::write(&flags.baseline, text).with_context(|| shown.to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    print!("{judgement}");
    Ok(if judgement.holds() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl Counts {
    /// Counts everything that this process has the rights for.
    pub fn take() -> Result<Self> {
        let mut taken = Self::of_object(&object_of_this_build()?)?;
        for services in [10, 1000] {
            for (what, operations) in changes::operations(services)? {
                let name = format!("change of {services} Services: {what}.operations");
                taken.counts.insert(name, operations as u64);
            }
        }
        if nix::unistd::geteuid().is_root() {
            let release = nix::sys::utsname::uname()?;
            let release = release.release().to_string_lossy().into_owned();
            let parts: Vec<&str> = release.split('.').take(2).collect();
            taken.kernel = parts.join(".");
            taken.counts.extend(verified()?);
        }
        Ok(taken)
    }

    fn of_object(bytes: &[u8]) -> Result<Self> {
        let mut counts = BTreeMap::new();
        for (name, function) in object::functions(bytes)? {
            counts.insert(format!("{name}.instructions"), function.instructions);
            counts.insert(format!("{name}.stack"), function.stack_bytes);
            let calls = |number: u32| function.helpers.get(&number).copied().unwrap_or(0);
            for (kind, number) in [
                ("lookup", helper::MAP_LOOKUP),
                ("update", helper::MAP_UPDATE),
                ("delete", helper::MAP_DELETE),
            ] {
                counts.insert(format!("{name}.{kind}.calls"), calls(number));
            }
            let all = function.helpers.values().sum();
            counts.insert(format!("{name}.helper.calls"), all);
            counts.insert(format!("{name}.inner.calls"), function.inner_calls);
        }
        Ok(Self {
            kernel: String::new(),
            counts,
        })
    }

    /// These, with the verifier's counts of another where it has not been asked.
    fn or_verified_by(mut self, other: &Self) -> Self {
        if self.kernel.is_empty() {
            self.kernel.clone_from(&other.kernel);
            let verified = other
                .counts
                .iter()
                .filter(|(name, _)| name.ends_with(VERIFIED));
            self.counts
                .extend(verified.map(|(name, count)| (name.clone(), *count)));
        }
        self
    }
}

/// The compiled programs of the build that this program is from: the agent's build leaves them in cargo's target folder.
fn object_of_this_build() -> Result<Vec<u8>> {
    let program = std::env::current_exe()?;
    let mut above = program.ancestors();
    let target = above
        .find(|folder| folder.join("CACHEDIR.TAG").exists())
        .context("this program is in no target folder of cargo")?;
    let object = target.join(Path::new("ebpf/bpfel-unknown-none/release/dataplane-ebpf"));
    fs::read(&object).with_context(|| object.display().to_string())
}

/// Instructions that the verifier looked at until it was content, of each program that the agent loads.
fn verified() -> Result<BTreeMap<String, u64>> {
    // On a thread of its own: the sandbox changes the namespaces of the thread that enters it.
    std::thread::scope(|scope| {
        let counted = scope.spawn(|| {
            let sandbox = Sandbox::enter()?;
            let mut loaded = Dataplane::open(&Config {
                node_v4: Some([198, 18, 0, 1].into()),
                node_v6: Some([0xfd00, 0, 0, 0, 0, 0, 0, 1].into()),
                masquerade: true,
                kernel_dns: true,
                ..Config::new(sandbox.pin_root())
            })?;
            let _names = loaded.load_names()?;
            // Others may have programs of these names loaded too: only those count that this process holds.
            let mut held = BTreeMap::new();
            for entry in fs::read_dir("/proc/self/fdinfo")? {
                let text = fs::read_to_string(entry?.path()).unwrap_or_default();
                let field = |name: &str| {
                    let line = text.lines().find(|line| line.starts_with(name));
                    line.and_then(|line| line.split_whitespace().nth(1))
                        .and_then(|value| value.parse::<u64>().ok())
                };
                if let (Some(id), Some(count)) = (field("prog_id:"), field("verified_insns:")) {
                    held.insert(id, count);
                }
            }
            let mut counts = BTreeMap::new();
            for program in aya::programs::loaded_programs() {
                // Others come and go while they are listed.
                let Ok(program) = program else { continue };
                if let Some(count) = held.get(&u64::from(program.id())) {
                    let name = program.name_as_str().context("a program without a name")?;
                    counts.insert(format!("{name}{VERIFIED}"), *count);
                }
            }
            Ok(counts)
        });
        counted
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// What of the counts has changed.
#[derive(Debug, Default)]
struct Judgement {
    /// Grew by more than they may, or nobody has agreed to them.
    faults: Vec<String>,
    /// Became smaller, went, or could not be counted here.
    remarks: Vec<String>,
}

impl Judgement {
    fn of(baseline: &Counts, now: &Counts) -> Self {
        let mut judgement = Self::default();
        let comparable = baseline.kernel == now.kernel;
        if !comparable {
            judgement.remarks.push(format!(
                "the verifier's counts are of kernel {:?}, this is {:?} (empty: not root): not compared",
                baseline.kernel, now.kernel
            ));
        }
        let is_counted = |name: &&String| comparable || !name.ends_with(VERIFIED);
        let names: BTreeSet<&String> = baseline.counts.keys().chain(now.counts.keys()).collect();
        for name in names.into_iter().filter(is_counted) {
            match (baseline.counts.get(name), now.counts.get(name)) {
                (Some(&was), Some(&is)) => {
                    let tolerance = tolerance(name);
                    let change = format!("{name}: {was} -> {is} (tolerance {tolerance} %)");
                    if is * 100 > was * (100 + tolerance) {
                        judgement.faults.push(change);
                    } else if is * 100 < was * (100 - tolerance) {
                        judgement.remarks.push(change);
                    }
                }
                (None, Some(is)) => judgement.faults.push(format!("{name}: new, {is}")),
                (Some(was), None) => judgement.remarks.push(format!("{name}: gone, was {was}")),
                (None, None) => {}
            }
        }
        judgement
    }

    fn holds(&self) -> bool {
        self.faults.is_empty()
    }
}

fn tolerance(name: &str) -> u64 {
    let quantity = name.rsplit('.').next().unwrap_or_default();
    let mut known = TOLERANCE.iter();
    known
        .find(|(known, _)| *known == quantity)
        .map_or(0, |(_, percent)| *percent)
}

impl fmt::Display for Judgement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for remark in &self.remarks {
            writeln!(f, "note   {remark}")?;
        }
        for fault in &self.faults {
            writeln!(f, "GATE   {fault}")?;
        }
        if self.holds() {
            writeln!(f, "the gate holds")
        } else {
            writeln!(
                f,
                "{} counts grew or are new. If that is meant, `cargo xtask gate --update` and say why in the commit message.",
                self.faults.len()
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn baseline() -> Counts {
        serde_json::from_str(include_str!("../../gate.json")).expect("the project's baseline")
    }

    #[test]
    fn nothing_has_grown_unnoticed() {
        let judgement = Judgement::of(&baseline(), &Counts::take().expect("counts"));
        assert!(judgement.holds(), "\n{judgement}");
    }

    /// Timeouts are the monotonic clock's: whoever sets the machine's clock ends no flow.
    #[test]
    fn no_program_reads_a_clock_that_can_be_set() {
        let bytes = object_of_this_build().expect("our own object");
        let functions = object::functions(&bytes).expect("an object");
        let calls = |number: u32| {
            let of = |function: &object::Function| function.helpers.get(&number).copied();
            functions.values().filter_map(of).sum::<u64>()
        };
        assert_eq!(calls(helper::KTIME_GET_TAI_NS), 0);
        assert!(calls(helper::KTIME_GET_COARSE_NS) > 0);
    }

    /// What is found wrong with our own object when one of its arithmetic instructions, a register's move (`r1 = r6`: there are
    /// many), is another one: what an added line in a program does.
    fn faults_with(instruction: [u8; 8]) -> Vec<String> {
        let mut bytes = object_of_this_build().expect("our own object");
        let before = Counts::of_object(&bytes).expect("an object");
        let (instructions, _) = bytes.as_chunks_mut::<8>();
        let moved = [0xbf, 0x61, 0, 0, 0, 0, 0, 0];
        let found = instructions.iter_mut().find(|found| **found == moved);
        *found.expect("a move") = instruction;
        let after = Counts::of_object(&bytes).expect("still an object");
        Judgement::of(&before, &after).faults
    }

    #[test]
    fn one_lookup_more_per_packet_is_caught() {
        // `call map_lookup_elem`
        let faults = faults_with([0x85, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(faults.len(), 2, "{faults:?}");
        let caught = faults.iter().any(|fault| fault.contains(".lookup.calls"));
        assert!(caught, "{faults:?}");
    }

    /// The same where the look-up is in another function of the object.
    #[test]
    fn one_call_more_of_an_own_function_is_caught() {
        let faults = faults_with([0x85, 0x10, 0, 0, 0, 0, 0, 0]);
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert!(faults[0].contains(".inner.calls"), "{faults:?}");
    }

    #[test]
    fn what_a_change_costs_does_not_depend_on_the_cluster() {
        let costs = [10, 1000].map(|services| changes::operations(services).expect("a cluster"));
        assert_eq!(costs[0], costs[1]);
        assert!(costs[0].contains(&("one more endpoint", 1)), "{costs:?}");
        assert!(costs[0].contains(&("nothing", 0)), "{costs:?}");
    }

    #[test]
    fn growth_within_the_tolerance_is_none_and_new_programs_are_to_be_agreed_to() {
        let counts = |pairs: &[(&str, u64)]| Counts {
            kernel: String::new(),
            counts: pairs
                .iter()
                .map(|(name, count)| ((*name).to_owned(), *count))
                .collect(),
        };
        let before = counts(&[
            ("a.instructions", 1000),
            ("a.lookup.calls", 4),
            ("b.stack", 8),
        ]);
        let within = counts(&[("a.instructions", 1030), ("a.lookup.calls", 4)]);
        let judgement = Judgement::of(&before, &within);
        assert!(judgement.holds(), "{judgement}");
        assert_eq!(judgement.remarks.len(), 1, "{judgement}");
        let beyond = counts(&[
            ("a.instructions", 1031),
            ("a.lookup.calls", 5),
            ("c.stack", 8),
        ]);
        assert_eq!(Judgement::of(&before, &beyond).faults.len(), 3);
    }
}
