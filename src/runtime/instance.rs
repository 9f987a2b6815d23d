//! One container, seen from the daemon: its pipes, its start, its end.

use super::executor::{First, encode_late};
use super::extensions::{self, Extensions, Word};
use super::session::{ANSWER_MAX, Process};
use super::{Exit, Running, RuntimeError};
use futures_lite::FutureExt;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};
use smol::channel::Receiver;
use smol::{Async, Timer};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

/// What `Parked` and `Running` have in common.
pub struct Instance {
    pub id: String,
    pub process: Process,
    pub exit: Receiver<Exit>,
    /// Answers its questions for names as long as it is there.
    pub _names: Option<smol::Task<()>>,
}

/// The daemon's ends.
pub struct Pipes {
    stdin: Async<File>,
    stdout: Async<File>,
    stderr: Async<File>,
    late: Async<OwnedFd>,
}

impl Pipes {
    /// Ours, and the container's in the order that `Create` wants.
    pub fn make() -> io::Result<(Self, [OwnedFd; 4])> {
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
        let (stdin_out, stdin_in) = pipe()?;
        let (stdout_out, stdout_in) = pipe()?;
        let (stderr_out, stderr_in) = pipe()?;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let pipes = Self {
            stdin: Async::new(File::from(stdin_in))?,
            stdout: Async::new(File::from(stdout_out))?,
            stderr: Async::new(File::from(stderr_out))?,
            late: Async::new(ours)?,
        };
        Ok((pipes, [stdin_out, stdout_in, stderr_in, theirs]))
    }
}

pub struct ParkedInside {
    pub instance: Instance,
    pub pipes: Pipes,
}

impl ParkedInside {
    /// With the extensions that were started, whose command waits for the word to go on.
    pub async fn start(
        self,
        env: &[(String, String)],
        first: First,
    ) -> Result<(Running, Option<Extensions>), RuntimeError> {
        let Self { instance, pipes } = self;
        let packet = encode_late(first, env).map_err(RuntimeError::Unusable)?;
        if let Ok(exit) = instance.exit.try_recv() {
            return Err(instance.gone(exit));
        }
        let Pipes { stdin, stdout, stderr, late } = pipes;
        let sent = late.write_with(|late| Ok(rustix::net::send(late, &packet, SendFlags::NOSIGNAL)?)).await;
        if sent.is_err() {
            let told = async { instance.exit.recv().await.unwrap_or(Exit::Lost) };
            let late = async {
                Timer::after(ANSWER_MAX).await;
                Exit::Lost
            };
            return Err(instance.gone(told.or(late).await));
        }
        // The socket ends when the command is being executed, or speaks when it can't be, or not yet.
        let started = match extensions::hear(&late).await {
            Ok(None) => None,
            Ok(Some(Word::Started(names, processes))) => Some(Extensions::new(names, processes, late)),
            Ok(Some(Word::Complaint(why))) => return Err(RuntimeError::Unusable(why)),
            Err(err) if err.kind() == io::ErrorKind::TimedOut => {
                return Err(RuntimeError::Launcher(format!(
                    "instance {} does not get to its command",
                    instance.id
                )));
            }
            Err(_) => None, // it died on its way: `wait` tells how
        };
        let running = Running {
            stdin: Some(stdin),
            stdout: Some(stdout),
            stderr: Some(stderr),
            inside: RunningInside { instance, ended: None },
        };
        Ok((running, started))
    }
}

pub struct RunningInside {
    instance: Instance,
    ended: Option<Exit>,
}

impl RunningInside {
    pub async fn wait(&mut self) -> Exit {
        if let Some(exit) = self.ended {
            return exit;
        }
        let exit = self.instance.exit.recv().await.unwrap_or(Exit::Lost);
        self.ended = Some(exit);
        exit
    }

    pub fn signal(&self, signal: i32) {
        if self.ended.is_none() {
            self.instance.process.signal(signal);
        }
    }
}

impl Instance {
    /// Why it can't be started any more.
    fn gone(&self, exit: Exit) -> RuntimeError {
        match exit {
            Exit::Lost => RuntimeError::Lost,
            _ => RuntimeError::Launcher(format!("instance {} has ended before it was started", self.id)),
        }
    }
}
