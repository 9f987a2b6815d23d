//! The system calls a function may make: Docker's default profile, resolved for this machine,
//! compiled once with libseccomp, loaded by each container's first process.
//!
//! libcontainer's own seccomp support stays off: it compiles the filter for every launch (9 ms),
//! ignores the profile's conditions (so `mount` and `unshare` would be allowed to everyone) and
//! translates masked comparisons the wrong way round (so `clone(CLONE_NEWUSER)` would be).
//!
//! Names that the linked libseccomp does not know are left out. Calls newer than all it knows
//! get ENOSYS instead of the profile's EPERM, by a few instructions in front of the filter: C
//! libraries try a new call and fall back to an old one on ENOSYS only.

use super::sys;
use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::{self, Read, Seek, Write};
use std::str::FromStr;

const PROFILE: &str = include_str!("seccomp.json");

/// What BPF programs may be at most (BPF_MAXINSNS).
const INSTRUCTIONS_MAX: usize = 4096;

/// Numbers from here up are the ABI's own: ARM's private calls, x32's bit. Not "newer".
const PRIVATE_NUMBERS: u32 = 0x000f_0000;

/// A compiled filter.
#[derive(Clone)]
pub struct Filter {
    program: Vec<libc::sock_filter>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_errno: i32,
    arch_map: BTreeMap<String, Vec<String>>,
    syscalls: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    names: Vec<String>,
    action: String,
    errno_ret: Option<i32>,
    #[serde(default)]
    args: Vec<Argument>,
    #[serde(default)]
    includes: Condition,
    #[serde(default)]
    excludes: Condition,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Argument {
    index: u32,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Condition {
    #[serde(default)]
    caps: Vec<String>,
    #[serde(default)]
    arches: Vec<String>,
    min_kernel: Option<String>,
}

/// What the profile's conditions ask about. Functions have no capabilities at all.
#[derive(Clone, Copy)]
struct Machine<'a> {
    /// As the profile names it: `amd64`.
    arch: &'a str,
    kernel: (u32, u32),
}

impl Entry {
    fn applies(&self, machine: Machine<'_>) -> bool {
        let included = self.includes.caps.is_empty()
            && (self.includes.arches.is_empty() || self.includes.arches.iter().any(|a| a == machine.arch))
            && self.includes.min_kernel.as_deref().is_none_or(|min| machine.kernel >= kernel_version(min));
        included && !self.excludes.arches.iter().any(|a| a == machine.arch)
    }
}

impl Filter {
    /// Compiles the profile for this machine: some 15 ms, once.
    pub fn compile() -> Result<Self, String> {
        let profile: Profile =
            serde_json::from_str(PROFILE).expect("the embedded profile is tested to parse");
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let machine = Machine { arch: profile_arch(), kernel: kernel_version(&release) };
        let wrong = |doing: &str, err: libseccomp::error::SeccompError| format!("{doing}: {err}");

        let mut filter = ScmpFilterContext::new(ScmpAction::Errno(profile.default_errno))
            .map_err(|err| wrong("make a filter", err))?;
        // A balanced tree instead of a list of 900 comparisons; older libraries have the list only.
        let _ = filter.set_ctl_optimize(2);
        let native = ScmpArch::native();
        for sub in profile.arch_map.get(profile_arch_token()).into_iter().flatten() {
            let arch = ScmpArch::from_str(sub).map_err(|err| wrong(sub, err))?;
            filter.add_arch(arch).map_err(|err| wrong(sub, err))?;
        }

        let mut newest_known = 0;
        let mut rules = 0;
        for entry in &profile.syscalls {
            let action = entry.action();
            let arguments = entry.args.iter().map(Argument::compare).collect::<Result<Vec<_>, _>>()?;
            for name in &entry.names {
                // An allowed call that can't be expressed stays refused: the safe side.
                let Ok(call) = ScmpSyscall::from_name(name) else { continue };
                let number = ScmpSyscall::from_name_by_arch(name, native).map_or(-1, |n| n.as_raw_syscall());
                newest_known = newest_known.max(number);
                if entry.applies(machine) && filter.add_rule_conditional(action, call, &arguments).is_ok() {
                    rules += 1;
                }
            }
        }
        if rules < 200 {
            return Err(format!("only {rules} rules of the profile are known to the linked libseccomp"));
        }

        let mut file = std::fs::File::from(
            rustix::fs::memfd_create("neap-seccomp", rustix::fs::MemfdFlags::CLOEXEC)
                .map_err(|err| format!("make a memory file: {err}"))?,
        );
        filter.export_bpf(&file).map_err(|err| wrong("export the filter", err))?;
        let mut bytes = Vec::new();
        file.rewind().and_then(|()| file.read_to_end(&mut bytes)).map_err(|err| format!("read it: {err}"))?;
        let mut program = newer_calls_are_unknown(newest_known as u32);
        program.extend(Self::from_bytes(&bytes).program);
        if program.len() > INSTRUCTIONS_MAX {
            return Err(format!("the filter has {} instructions, {INSTRUCTIONS_MAX} at most", program.len()));
        }
        Ok(Self { program })
    }

    /// The same in a child, for a process with a single thread: libseccomp leaves megabytes of
    /// heap behind that every fork would copy the page tables of, for as long as the launcher lives.
    pub fn compiled_by_a_child() -> Result<Self, String> {
        let wrong = |doing: &'static str| move |err: io::Error| format!("{doing}: {err}");
        let (mut read, write) = io::pipe().map_err(wrong("make a pipe"))?;
        match sys::fork().map_err(wrong("fork"))? {
            nix::unistd::ForkResult::Child => {
                let sent = std::panic::catch_unwind(Self::compile).is_ok_and(|compiled| {
                    let (kind, bytes) = match compiled {
                        Ok(filter) => (0, filter.bytes()),
                        Err(why) => (1, why.into_bytes()),
                    };
                    let mut write = write;
                    write.write_all(&[kind]).and_then(|()| write.write_all(&bytes)).is_ok()
                });
                sys::exit_now(i32::from(!sent))
            }
            nix::unistd::ForkResult::Parent { child } => {
                drop(write);
                let mut bytes = Vec::new();
                let got = read.read_to_end(&mut bytes);
                let _ = nix::sys::wait::waitpid(child, None);
                got.map_err(wrong("read the child's filter"))?;
                match bytes.split_first() {
                    Some((0, bytes)) => Ok(Self::from_bytes(bytes)),
                    Some((_, why)) => Err(String::from_utf8_lossy(why).into_owned()),
                    None => Err("the child that compiles it died".to_owned()),
                }
            }
        }
    }

    /// As the kernel's structures are laid out.
    fn bytes(&self) -> Vec<u8> {
        let one = |i: &libc::sock_filter| {
            let (code, k) = (i.code.to_ne_bytes(), i.k.to_ne_bytes());
            [code[0], code[1], i.jt, i.jf, k[0], k[1], k[2], k[3]]
        };
        self.program.iter().flat_map(one).collect()
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let one = |c: &[u8]| libc::sock_filter {
            code: u16::from_ne_bytes([c[0], c[1]]),
            jt: c[2],
            jf: c[3],
            k: u32::from_ne_bytes([c[4], c[5], c[6], c[7]]),
        };
        Self { program: bytes.chunks_exact(8).map(one).collect() }
    }

    /// Binds the calling thread to the filter, for ever. It must have no_new_privs.
    pub fn load(&self) -> io::Result<()> {
        let program = libc::sock_fprog {
            len: self.program.len() as u16, // INSTRUCTIONS_MAX fits
            filter: self.program.as_ptr().cast_mut(),
        };
        // SAFETY: `program` points at `len` instructions that outlive the call; the kernel copies
        // and checks them. No library offers the call for a program that is already compiled.
        let done = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &program) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Entry {
    fn action(&self) -> ScmpAction {
        match self.action.as_str() {
            "SCMP_ACT_ALLOW" => ScmpAction::Allow,
            _ => ScmpAction::Errno(self.errno_ret.unwrap_or(libc::EPERM)),
        }
    }
}

impl Argument {
    fn compare(&self) -> Result<ScmpArgCompare, String> {
        let (op, datum) = match self.op.as_str() {
            "SCMP_CMP_NE" => (ScmpCompareOp::NotEqual, self.value),
            "SCMP_CMP_LT" => (ScmpCompareOp::Less, self.value),
            "SCMP_CMP_LE" => (ScmpCompareOp::LessOrEqual, self.value),
            "SCMP_CMP_EQ" => (ScmpCompareOp::Equal, self.value),
            "SCMP_CMP_GE" => (ScmpCompareOp::GreaterEqual, self.value),
            "SCMP_CMP_GT" => (ScmpCompareOp::Greater, self.value),
            // `value` is the mask, `valueTwo` what must be left of it (runc's reading).
            "SCMP_CMP_MASKED_EQ" => (ScmpCompareOp::MaskedEqual(self.value), self.value_two),
            other => return Err(format!("unknown comparison {other}")),
        };
        Ok(ScmpArgCompare::new(self.index, op, datum))
    }
}

/// `if number > newest && number < PRIVATE_NUMBERS { return ENOSYS }`, in classic BPF. From 424
/// on, numbers are the same on every architecture.
fn newer_calls_are_unknown(newest: u32) -> Vec<libc::sock_filter> {
    let load_number = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    let greater = (libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16;
    let at_least = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
    let give_back = (libc::BPF_RET | libc::BPF_K) as u16;
    let one = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    vec![
        one(load_number, 0, 0, 0),
        one(greater, 0, 2, newest),
        one(at_least, 1, 0, PRIVATE_NUMBERS),
        one(give_back, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
    ]
}

/// `6.1.0-56-cloud` → (6, 1)
fn kernel_version(release: &str) -> (u32, u32) {
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

fn profile_arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other, // "arm" and "riscv64" are the profile's names too
    }
}

fn profile_arch_token() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "SCMP_ARCH_X86_64",
        "aarch64" => "SCMP_ARCH_AARCH64",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: Machine<'static> = Machine { arch: "amd64", kernel: (6, 1) };

    fn profile() -> Profile {
        serde_json::from_str(PROFILE).expect("the embedded profile parses")
    }

    fn allowed(name: &str, machine: Machine<'_>) -> bool {
        profile().syscalls.iter().any(|entry| {
            entry.applies(machine)
                && entry.action == "SCMP_ACT_ALLOW"
                && entry.args.is_empty()
                && entry.names.iter().any(|n| n == name)
        })
    }

    #[test]
    fn calls_that_need_a_capability_are_not_allowed() {
        for name in
            ["mount", "unshare", "setns", "bpf", "keyctl", "clone", "clone3", "socket", "reboot", "chroot"]
        {
            assert!(!allowed(name, MACHINE), "{name}");
        }
        for name in ["execve", "accept4", "recvfrom", "futex", "rt_sigprocmask"] {
            assert!(allowed(name, MACHINE), "{name}");
        }
    }

    #[test]
    fn conditions_of_the_profile_are_honoured() {
        assert!(allowed("ptrace", MACHINE));
        assert!(!allowed("ptrace", Machine { kernel: (4, 4), ..MACHINE }));
        assert!(allowed("arch_prctl", MACHINE));
        assert!(!allowed("arch_prctl", Machine { arch: "arm64", ..MACHINE }));
        assert!(allowed("cacheflush", Machine { arch: "arm64", ..MACHINE }));
    }

    #[test]
    fn every_rule_of_the_profile_can_be_expressed() {
        for entry in profile().syscalls {
            assert!(["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"].contains(&entry.action.as_str()));
            for argument in &entry.args {
                assert!(argument.compare().is_ok(), "{argument:?}");
            }
        }
    }

    #[test]
    fn kernel_versions_compare_as_numbers() {
        assert_eq!(kernel_version("6.18.44-fc"), (6, 18));
        assert!(kernel_version("6.1.0-56-cloud") < kernel_version("6.10"));
        assert_eq!(kernel_version(""), (0, 0));
    }

    #[test]
    fn compiled_filter_fits_the_kernels_limit() {
        let filter = Filter::compile().expect("libseccomp compiles the profile");
        assert!((100..INSTRUCTIONS_MAX).contains(&filter.program.len()), "{}", filter.program.len());
    }
}
