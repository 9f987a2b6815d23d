//! A certificate authority for one test, made by `openssl`.

use super::TestDir;
use std::path::PathBuf;
use std::process::Command;

/// PEM files. The server's names: localhost and 127.0.0.1.
#[derive(Debug)]
pub struct Certificates {
    pub ca: PathBuf,
    pub server_cert: PathBuf,
    pub server_key: PathBuf,
    pub client_cert: PathBuf,
    pub client_key: PathBuf,
    _dir: TestDir,
}

impl Certificates {
    pub fn new() -> Self {
        let dir = TestDir::new("tls");
        let path = |name: &str| dir.join(name);
        key("ca.key", &dir);
        openssl(
            &dir,
            "req -x509 -new -key ca.key -out ca.pem -days 3650 -subj /CN=test-ca \
             -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign",
        );
        for (name, extensions) in [
            ("server", "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n"),
            ("client", "subjectAltName=DNS:gateway\nextendedKeyUsage=clientAuth\n"),
        ] {
            key(&format!("{name}.key"), &dir);
            dir.write(&format!("{name}.ext"), extensions);
            openssl(&dir, &format!("req -new -key {name}.key -out {name}.csr -subj /CN={name}"));
            openssl(
                &dir,
                &format!(
                    "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out {name}.pem \
                     -days 3650 -extfile {name}.ext"
                ),
            );
        }
        Self {
            ca: path("ca.pem"),
            server_cert: path("server.pem"),
            server_key: path("server.key"),
            client_cert: path("client.pem"),
            client_key: path("client.key"),
            _dir: dir,
        }
    }
}

fn key(name: &str, dir: &TestDir) {
    openssl(dir, &format!("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out {name}"));
}

fn openssl(dir: &TestDir, arguments: &str) {
    let output = Command::new("openssl")
        .args(arguments.split_whitespace())
        .current_dir(dir.path())
        .output()
        .expect("run openssl");
    assert!(
        output.status.success(),
        "openssl {arguments}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
}
