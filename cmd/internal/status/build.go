package status

import (
	"cmp"
	"fmt"
	"runtime/debug"
)

// Build is what a program knows of its making.
type Build struct{ Version, Revision, Go string }

// ReadBuild returns the running program's.
func ReadBuild() (b Build) {
	if info, ok := debug.ReadBuildInfo(); ok {
		b = Build{Version: info.Main.Version, Go: info.GoVersion}
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				b.Revision = s.Value[:min(12, len(s.Value))]
			}
		}
	}
	b.Version = cmp.Or(b.Version, "(devel)")
	return b
}

func (b Build) String() string {
	if b.Revision == "" {
		return fmt.Sprintf("%s (%s)", b.Version, b.Go)
	}
	return fmt.Sprintf("%s (%s, %s)", b.Version, b.Revision, b.Go)
}
