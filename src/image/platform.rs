//! Which of an image's platforms this machine runs.
//!
//! The order of preference is containerd's (`platforms.Only`): on arm the machine's own variant,
//! then the older ones; on amd64 the highest level that the processor has.

use serde::Deserialize;

/// OCI image-spec image-index.md, "platform". Docker's manifest lists have the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Platform {
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub variant: Option<String>,
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        // arm64's only variant says nothing.
        match self.variant.as_deref() {
            None | Some("") => Ok(()),
            Some("v8") if self.architecture == "arm64" => Ok(()),
            Some(variant) => write!(f, "/{variant}"),
        }
    }
}

/// What runs here: one architecture and its variants, best first. `""`: images that name none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    pub architecture: &'static str,
    pub variants: Vec<&'static str>,
}

impl Machine {
    pub fn this() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            "loongarch64" => "loong64",
            other => other,
        };
        Self { architecture, variants: variants(architecture) }
    }

    /// The better, the smaller; `None`: does not run here.
    pub fn rank(&self, platform: &Platform) -> Option<usize> {
        if platform.os != "linux" || platform.architecture != self.architecture {
            return None;
        }
        let variant = platform.variant.as_deref().unwrap_or("");
        self.variants.iter().position(|v| *v == variant)
    }

    /// As `docker buildx build --platform` takes it.
    pub fn name(&self) -> String {
        match (self.architecture, self.variants.first()) {
            ("arm", Some(variant)) if !variant.is_empty() => format!("linux/arm/{variant}"),
            _ => format!("linux/{}", self.architecture),
        }
    }
}

fn variants(architecture: &str) -> Vec<&'static str> {
    match architecture {
        "amd64" => {
            let levels: &[&'static str] = match amd64_level() {
                3.. => &["v3", "v2"],
                2 => &["v2"],
                _ => &[],
            };
            levels.iter().copied().chain(["", "v1"]).collect()
        }
        "arm64" => vec!["v8", ""],
        "arm" => {
            let machine = rustix::system::uname();
            let v6 = machine.machine().to_bytes().starts_with(b"armv6");
            let v7: &[&'static str] = if v6 { &[] } else { &["v7"] };
            // An arm image without a variant is v7 to docker; v6 boards have to trust it.
            v7.iter().copied().chain(["", "v6", "v5"]).collect()
        }
        _ => vec![""],
    }
}

/// The x86-64 psABI's microarchitecture levels, by what tells them apart.
#[cfg(target_arch = "x86_64")]
fn amd64_level() -> u32 {
    use std::arch::is_x86_feature_detected as has;
    if !(has!("sse4.2") && has!("popcnt") && has!("ssse3")) {
        return 1;
    }
    let v3 = has!("avx2") && has!("bmi1") && has!("bmi2") && has!("fma") && has!("lzcnt") && has!("f16c");
    if v3 { 3 } else { 2 }
}

#[cfg(not(target_arch = "x86_64"))]
fn amd64_level() -> u32 {
    1
}

/// Why none fits, and the way out.
pub fn mismatch(machine: &Machine, present: &[Platform]) -> String {
    let mut names: Vec<String> = present.iter().map(Platform::to_string).collect();
    names.sort();
    names.dedup();
    let mut there = names.iter().take(20).cloned().collect::<Vec<_>>().join(", ");
    if there.is_empty() {
        there.push_str("no platform at all");
    }
    let here = machine.name();
    format!(
        "the image is for {there}; this machine is {here}: docker buildx build --platform {here} makes the right one"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(architecture: &str, variant: &str) -> Platform {
        let variant = (!variant.is_empty()).then(|| variant.to_owned());
        Platform { os: "linux".into(), architecture: architecture.into(), variant }
    }

    #[test]
    fn arm_v7_takes_older_arms_and_no_newer_one() {
        let machine = Machine { architecture: "arm", variants: vec!["v7", "", "v6", "v5"] };

        let ranks = ["v8", "v7", "v6", "v5", ""].map(|v| machine.rank(&platform("arm", v)));

        assert_eq!(ranks, [None, Some(0), Some(2), Some(3), Some(1)]);
        assert_eq!(machine.rank(&platform("arm64", "v8")), None);
        assert_eq!(machine.name(), "linux/arm/v7");
    }

    #[test]
    fn arm64_with_and_without_its_variant_is_the_same() {
        let machine = Machine { architecture: "arm64", variants: variants("arm64") };

        assert!(machine.rank(&platform("arm64", "v8")).is_some());
        assert!(machine.rank(&platform("arm64", "")).is_some());
        assert_eq!(platform("arm64", "v8").to_string(), "linux/arm64");
    }

    #[test]
    fn this_machine_runs_its_own_plain_architecture() {
        let machine = Machine::this();

        assert!(machine.rank(&platform(machine.architecture, "")).is_some());
        assert!(
            machine.rank(&Platform { os: "windows".into(), ..platform(machine.architecture, "") }).is_none()
        );
    }

    #[test]
    fn mismatch_names_what_is_there_and_how_to_get_the_right_one() {
        let machine = Machine { architecture: "arm64", variants: vec!["v8", ""] };

        let text = mismatch(&machine, &[platform("amd64", ""), platform("arm", "v7")]);

        assert!(text.contains("linux/amd64, linux/arm/v7"), "{text}");
        assert!(text.contains("docker buildx build --platform linux/arm64"), "{text}");
    }
}
