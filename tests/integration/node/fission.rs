//! Fission's environments: a server that is no function until it is told where its code is, and the
//! code in a directory of the node.

use super::possible;
use crate::support::python::python_image;
use crate::support::{Node, TestDir, have};

const ENVIRONMENT: &str = include_str!("../../images/python/fission.py");

fn function(name: &str, env: &str, from: &str, path: &str) -> String {
    format!(
        "name = \"{name}\"\nimage = \"pytest:1\"\nplatform = \"fission\"\nenv = {{ {env} }}\n\
         command = ['/usr/bin/python3', '-c', '''{ENVIRONMENT}''']\n[retry]\nattempts = 1\n\
         [[volume]]\nfrom = \"{from}\"\npath = \"{path}\"\n\
         [limits]\nmemory = \"192MiB\"\ncpu = 2\nstart = \"120s\"\n"
    )
}

#[test]
fn environment_loads_its_function_from_a_directory_of_the_node() {
    if !possible() || !have("Fission", "mmdebstrap") {
        return;
    }
    let code = TestDir::new("fission-code");
    let greet = "from flask import request\nfrom words import HELLO\n\
                 def greet():\n    return f\"{HELLO} {request.get_data(as_text=True)} at {request.path}\"\n";
    code.write("hello/main.py", greet);
    code.write("hello/words.py", "HELLO = 'hello'\n");
    code.write("old/user", "def main():\n    return 'of version 1'\n");
    let mounts = code.path().display();
    let node = Node::builder("fission").node_line(&format!("mounts = [\"{mounts}\"]")).start();
    node.import(python_image());
    let at = |name: &str| format!("{mounts}/{name}");
    let entry = "FISSION_FUNCTION = \"main.greet\"";
    node.deploy(&function("hello", entry, &at("hello"), "/userfunc"));
    let below = format!("{entry}, FISSION_FILEPATH = \"/userfunc/deployarchive\"");
    node.deploy(&function("archive", &below, &at("hello"), "/userfunc/deployarchive"));
    node.deploy(&function("old", "FISSION_VERSION = \"1\"", &at("old"), "/userfunc"));
    node.deploy(&function("none", "FISSION_FUNCTION = \"main.nothing\"", &at("hello"), "/userfunc"));

    let answers = ["/function/hello/door", "/function/archive/door", "/function/old"].map(|path| {
        let answer = node.post(path, "world");
        (answer.status, answer.text())
    });
    let none = node.post("/function/none", "");

    let [hello, archive, old] = answers;
    assert_eq!(hello, (200, "hello world at /door".to_owned()));
    assert_eq!(archive, hello);
    assert_eq!(old, (200, "of version 1".to_owned()));
    assert_eq!(none.status, 502, "{}", none.text());
    assert!(none.text().contains("specialize") && none.text().contains("500"), "{}", none.text());

    // The next instance has what is there then.
    code.write("hello/words.py", "HELLO = 'good evening'\n");
    node.deploy(&function("hello", &format!("{entry}, AGAIN = \"1\""), &at("hello"), "/userfunc"));
    assert_eq!(node.post("/function/hello", "world").text(), "good evening world at /");
}
